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

    Errors         one exception type; an upstream's error body in all its shapes
    Providers      one row of data per kind of provider
    Config         starter.json, or a file like it, and ${env.VAR:=default}
    Registry       models, aliases and tiers: which provider serves an id
    Requests       check a Messages request; what all dialects share
    Tokens         estimate token counts
    Events         build, write, read and fold Anthropic events
    Chat           OpenAI Chat Completions: request there, chunks back
    Messages       Anthropic's own format, for upstreams that speak it
    Responses      OpenAI's Responses: request there, events back
    Dialects       the table of what upstreams speak, and the demo model
    Remedies       what an upstream's refusal teaches
    Log            what people read: the log, and lines at a terminal
    Store          what must outlive a request, or the process
    Signing        AWS's credentials, and the signatures made with them
    Upstream       connections to providers
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
import weakref
import zlib

if sys.version_info < (3, 9):  # noqa: UP036
    sys.exit(f"ogx.py needs Python 3.9 or newer; this is {sys.version.split()[0]}")

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Callable, ClassVar, Literal, Union

__version__ = "0.1.0"

Json = dict[str, Any]  # an object on the wire, as json.loads gives it
log = logging.getLogger("ogx")

# ======== Errors =============================================================================
# One exception type carries what the client is told; it is caught at three edges: the HTTP
# handler, the stream writer and main. An upstream's words are kept and its origin added.

ERROR_TYPES = {  # Anthropic's error types by status (OpenAPI of the Messages API; gateway contract)
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
MIN_SECRET = 8  # characters of a key worth hiding; shorter ones are dummies, and words of any text
# What AWS says with status 403 when it's the credentials that are wrong, not what they may do.
WRONG_KEY = "(?i)security token|bearer token|authentication|signature"
# What moves a terminal's cursor, turns text around or is half a character; all but line ends.
CONTROLS = r"\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
CONTROL, BAD_ID = re.compile(f"[{CONTROLS}]"), re.compile(f"[\n{CONTROLS}]")
MAX_HEAD = 64 * 1024  # bytes of a head: a stream's first event, or a status line and headers
MAX_ID = 256  # characters of a model's id
KEY_CHARACTERS = "%+-./0123456789:=@ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"
MAX_ELEMENTS = 1_000_000  # of a JSON text: Python's parser holds up all threads while it reads them
JSON_STRING = re.compile(rb'"[^"]*"?')  # without escapes: a group would keep each of its turns
RETRY_AFTER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?|\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT")
# A quotation of four words or more is a user's or a model's text, but behind such a key.
QUOTATION = re.compile(r"""(\b(?:message|msg|error|detail)\\?['"]\s?:\s?\\?)?(?<!\w)"""
                       r"""(['"`])(?:[^\s'"`]{1,40}\s){3}.*?(?:\2(?!\w)|\Z)""", re.S)
NO_MONEY = (r"(?i)\b(insufficient|not enough|out of|used all)\b(?! permis).{0,30}\b(balance|"
            r"credit|fund)|\b(balance|credit|fund)s?\b.{0,30}(insufficient|not enough|too low)|"
            r"\brecharg|\barrears|\btop[ -]up\b")
CLIENT_GONE = 499  # nginx's status for a client that closed before its answer


@dataclass(eq=False, repr=False)
class OgxError(Exception):
    """A failure told to the client. A raised one holds on to its frames: keep a replace() of it."""

    status: int  # of HTTP
    message: str
    type: str = ""  # Anthropic's; empty: the usual one of the status
    headers: Mapping[str, str] = field(default_factory=dict)
    details: Json | None = None
    raw: bytes = b""  # the body as an upstream that speaks Messages wrote it
    refusal: Refusal | None = None  # the upstream's own words, where it said some
    quote: str = ""  # more of the message for the client alone: what a model said is in no log

    def __post_init__(self) -> None:
        super().__init__(self.message)
        usual = "invalid_request_error" if 400 <= self.status < 500 else "api_error"
        self.type = self.type or ERROR_TYPES.get(self.status, usual)

    def without(self, secrets: Iterable[str]) -> OgxError:
        """This error with keys hidden that an upstream may have quoted."""
        for secret in secrets:
            self.message = self.message.replace(secret, "***")
            self.quote = self.quote.replace(secret, "***")
            self.raw = self.raw.replace(secret.encode(), b"***")
        return self

    def body(self, request_id: str) -> Json:
        """Anthropic's error object: {"type": "error", "error": {...}, "request_id": ...}."""
        details = {"details": self.details} if self.details else {}
        words = without_controls(self.message + self.quote)
        error = {"type": self.type, "message": words, **details}
        return {"type": "error", "error": error, "request_id": request_id}


@dataclass(frozen=True)
class Refusal:
    """What an upstream said when it refused: its words and the fields remedies look at."""

    status: int
    message: str
    code: str = ""
    param: str = ""

    @functools.cached_property
    def words(self) -> str:
        """What it says, but for quotations; some gateways move the sentence into `param`."""
        return QUOTATION.sub(lambda m: m[0] if m[1] else "''", f"{self.message} {self.param}")


def refusal_from_body(status: int, body: bytes) -> Refusal:
    """What any provider says when it fails, in JSON, HTML or plain text. What came with HTTP 200
    instead of an answer gets the status it would have had."""
    text = body[:100_000].decode("utf-8", "replace").strip()
    node = json_or_none(text)
    if node is None:
        return Refusal(status, beginning(body) or http.client.responses.get(status, "no words"))
    told = told_in(node)
    codes = told.get("codes") or [""]
    if status == 200 or status >= 500:  # a router's 502 may be its provider's 400
        status = next((int(code) for code in codes if re.fullmatch("[45][0-9]{2}", code)), status)
    if status == 200:
        kinds = " ".join(codes).lower()
        status = next((known for stems, known in CODE_STATUSES if re.search(stems, kinds)), 500)
    words, param = told.get("message", text), told.get("param", "")
    return Refusal(status, cut(words, 2000), cut(codes[0], 200), cut(param, 500))


def told_in(node: Any, depth: int = 8) -> Json:
    """The message, codes and param in a part of an error body. The innermost count: what gateways
    put around them says little."""
    if isinstance(node, str):
        return {"message": node, **told_in(json_or_none(node), depth)}
    if isinstance(node, list) and node and depth > 0:
        told = told_in(node[0], depth - 1)
        if "loc" in dict_or_empty(node[0]):  # pydantic's
            with suppress(RecursionError):
                told["message"] = json.dumps(node)
        return told
    if not isinstance(node, dict) or depth <= 0:
        return {}
    own = [(name.lower(), node[name]) for name in sorted(node, key=len) if node[name]]
    plain = {name: str(value) for name, value in own if isinstance(value, (str, int))}
    path = node["loc"] if isinstance(node.get("loc"), list) else ()
    names = [part for part in path if isinstance(part, str)] or [plain.get("param", "")]
    codes = [plain[n] for end in ("code", "type", "status") for n in plain if n.endswith(end)]
    told = {"param": names[-1], "codes": codes}
    reasons = [value for end in REASON_NAMES for name, value in own if name.endswith(end)]
    for reason in sorted(reasons, key=lambda reason: isinstance(reason, (dict, list))):
        inner = told_in(reason, depth - 1)
        if "message" in inner:
            told.update({name: value for name, value in inner.items() if value})
    if "message" in told and "provider_name" in plain:  # OpenRouter's
        told["message"] = f"{plain['provider_name']}: {told['message']}"
    return told


def is_failure(answer: Json) -> bool:
    """Whether what came with HTTP 200 is an error and no part of an answer."""
    is_answer = answer.get("choices") is not None or "content" in answer
    return bool(answer.get("error")) or not is_answer and "message" in told_in(answer)


def number_or_none(text: str) -> float | None:
    """The number; None for what JSON hasn't."""
    number = float(text)
    return number if math.isfinite(number) else None


PLAIN_JSON = json.JSONDecoder(parse_constant=number_or_none, parse_float=number_or_none)


def json_or_none(data: str | bytes) -> Any:
    """The value of a JSON text; None for null and for what is no JSON, or has too many elements."""
    if has_too_many_elements(data):
        return None
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
        return PLAIN_JSON.decode(text)
    except (ValueError, RecursionError):
        return None


def has_too_many_elements(data: str | bytes) -> bool:
    """Whether a JSON text has so many elements, outside of strings, that it takes long to read."""
    if len(data) <= MAX_ELEMENTS:
        return False
    data = data.encode("utf-8", "replace") if isinstance(data, str) else data
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_ELEMENTS:
        data = JSON_STRING.sub(b"", data.replace(rb"\\", b"").replace(rb'\"', b""))
    return sum(map(data.count, (b",", b"[", b"{"))) > MAX_ELEMENTS


def without_controls(text: str) -> str:
    """A text as a terminal may show it, with ? for what CONTROL finds; line ends stay."""
    return text if text.isprintable() else CONTROL.sub("?", text)


def whole_number(value: Any) -> int:
    """A number as a count, which JSON's readers in other languages know too; else 0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 < value < 1 << 53 else 0


def cut(text: str, size: int) -> str:
    """The beginning of a long text. It ends between words: half a key would not be known as one."""
    return text if len(text) <= size else text[:size].rstrip(KEY_CHARACTERS) + "..."


def dict_or_empty(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def beginning(data: bytes) -> str:
    """How an odd answer begins: the title of an HTML page, else the text, in 500 characters."""
    # Where a tag isn't closed, these expressions look for its end again and again: cut before.
    text = cut(data[:4000].decode("utf-8", "replace").strip(), 3900)
    if "<html" in text[:1000].lower() or text[:9].lower() == "<!doctype":
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.I | re.S)
        body = re.sub(r"(?s)<(script|style).*?</\1>|<[^>]+>", " ", text)
        return "an HTML page: " + cut(one_line(title.group(1) if title else body), 300)
    return one_line(text)


def one_line(text: str) -> str:
    """A text for the log: no line breaks, 500 characters."""
    return cut(" ".join(text[:5000].split()), 500)


def unknown_data(words: str, data: bytes) -> OgxError:
    """The error for what an upstream sent instead of an answer: a page is told in the log too."""
    shown = beginning(data)
    told = shown if shown.startswith("an HTML page") else ""
    return OgxError(502, f"{words} {told}", quote="" if told else shown)


def upstream_error(refusal: Refusal, origin: str, headers: Mapping[str, str]) -> OgxError:
    """The error a client gets for an upstream's refusal: same status, the upstream's own words,
    then `(from ORIGIN)`. `retry-after` is passed on; what can't get better by itself says so,
    since Claude Code would retry it for minutes."""
    told = {k: headers[k] for k in ("retry-after",) if RETRY_AFTER.fullmatch(headers.get(k, ""))}
    wrong_key = refusal.status == 403 and re.search(WRONG_KEY, refusal.message)
    status = 401 if wrong_key else refusal.status if 400 <= refusal.status <= 599 else 502
    out_of_money = re.search(NO_MONEY, refusal.words) or (
        status in (400, 403) and "billing" in refusal.message)
    out_of_quota = status == 429 and "quota" in refusal.code
    kind = "billing_error" if out_of_money or out_of_quota else ""
    if kind or status in (401, 402, 403):
        told["x-should-retry"] = "false"
    return OgxError(status, f"{refusal.message} (from {origin})", kind, told, refusal=refusal)


# ======== Providers ==========================================================================
# One row per kind of provider. Code asks a row for its fields and never for its name. To add a
# provider: a row here, its line in starter.json (`make starter` writes it), a row in the tests.


@dataclass(frozen=True)
class ProviderKind:
    """A kind of provider; the defaults describe the OpenAI format as most servers speak it.
    Paths of requests are below the base URL; one that begins with ~ is below the server's root."""

    name: str
    base_url: str = ""  # with the version segment; empty: the user must give one
    key_vars: tuple[str, ...] = ()  # environment variables with the key; the first set one counts
    url_vars: tuple[str, ...] = ()
    verify_var: str = ""
    enabled_by: str = "key"  # "key" or "url": the variable that switches the starter's line on
    default_path: str = "/v1"  # for a user's URL without a path, where base_url has none either
    key_headers: tuple[str, ...] = ("authorization",)  # takes "Bearer KEY"; others the bare key
    signed: str = ""  # AWS's service and region in a URL; signs, where there is no key
    signed_by: tuple[str, ...] = ()  # switch its line on, the last: they have other uses too
    headers: tuple[tuple[str, str], ...] = ()  # sent with every request
    # How its models are found, and what tells about them.
    list_path: str = "/models"
    more_lists: tuple[tuple[str, str], ...] = ()  # further paths, and a pattern of the ids to take
    # Its other servers: pattern of their ids or lists' paths, what to replace in base_url, by what
    servers: tuple[tuple[str, str, str], ...] = ()
    loaded_path: str = ""  # lists the models in memory with the context they have there
    tokenizer: tuple[str, ...] = ()  # counts a chat request; a second path, the text of the first
    context_hint: str = ""  # how to give a model more context
    local_port: int = 0  # where `run` looks for it when nothing is configured
    identity: tuple[str, str] = ("", "")  # a path, and what only this server answers there
    # What it speaks. With both, one free probe tells whether this server has "messages".
    dialects: tuple[str, ...] = ("chat",)
    messages_path: str = "/messages"
    openai_root: str = ""  # where the paths of the other dialects begin, below the base URL
    native_gaps: tuple[str, ...] = ()  # what its Messages API refuses or loses: see lost_natively()
    native_models: str = ""  # pattern of the ids that have it; they have nothing else
    is_anthropic: bool = False  # takes all that Claude Code sends as it is
    # OpenAI's Responses API: where these hosts are, or where a refusal told (True), or never.
    responses_hosts: tuple[str, ...] = ()
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
    stream_above: int = 0  # refuses larger output limits unless streamed
    tool_ids: str = ""  # pattern of the ids of tool calls that it takes
    named_tool_choice: bool = True  # can be told to call one tool
    tool_call_extra: tuple[tuple[str, Any], ...] = ()  # fields that each call of the history needs
    format_with_tools: bool = True  # takes response_format beside tools; else it is asked in words
    answer_by: str = "format"  # how a JSON answer is asked for: as "format", "tool" or "words"
    root_unions: bool = True  # takes anyOf and its like at the root of a tool's schema
    # Of JSON schema, in tools. "*": all but STRUCTURE, "$ref": all that plain_schema() mends.
    refused_keywords: tuple[str, ...] = ()
    max_description: int = 0  # characters of a tool's; 0: any number
    max_tools: int = 0  # more are left out; 0: any number

    @property
    def switches(self) -> tuple[str, ...]:
        """The variables that switch the starter's line on."""
        return self.url_vars if self.enabled_by == "url" else self.key_vars + self.signed_by


BOTH = ("messages", "chat")
GAPS = ("document", "search_result", "server_tool")  # of most servers' Messages APIs
AWS_HOST = r"bedrock-(?:mantle|runtime)\.([a-z0-9-]*)\.[^/]+.*"
NINE, FORTY = "[a-zA-Z0-9]{9}", ".{1,40}"  # ids of tool calls
OPENAI: Json = {"max_tokens_field": "max_completion_tokens", "system_anywhere": True, "files": True,
                "cache_key": True, "root_unions": False, "max_tools": 128, "tool_ids": FORTY}
SKIP_SIGNATURE = (("extra_content", {"google": {
    "thought_signature": "skip_thought_signature_validator"}}),)
PROVIDER_KINDS = {kind.name: kind for kind in (
    ProviderKind("ollama", "http://localhost:11434/v1", ("OLLAMA_API_KEY",), ("OLLAMA_URL",),
                 enabled_by="url", list_path="~/api/tags", loaded_path="~/api/ps",
                 context_hint="restart it with OLLAMA_CONTEXT_LENGTH=64000 ollama serve",
                 local_port=11434, identity=("~/", "Ollama is running"), dialects=BOTH,
                 native_gaps=("document", "url_image", "tool_choice", "search_result", "is_error",
                              "output_format")),
    ProviderKind("vllm", "", ("VLLM_API_TOKEN",), ("VLLM_URL", "HOSTED_VLLM_API_BASE"),
                 enabled_by="url", verify_var="VLLM_TLS_VERIFY", local_port=8000,
                 identity=("/models", '"owned_by":"vllm"'), dialects=BOTH, native_gaps=GAPS,
                 tokenizer=("~/tokenize",), top_k=True),
    ProviderKind("lm-studio", "http://localhost:1234/v1", ("LM_STUDIO_API_KEY",),
                 ("LM_STUDIO_URL", "LM_STUDIO_API_BASE"), enabled_by="url",
                 list_path="~/api/v0/models", local_port=1234,
                 identity=("~/lmstudio-greeting", '"lmstudio":true'), dialects=BOTH,
                 native_gaps=GAPS),
    ProviderKind("llama-cpp", "http://localhost:8080/v1", ("LLAMA_API_KEY",), ("LLAMA_CPP_URL",),
                 enabled_by="url", local_port=8080, identity=("/models", '"owned_by":"llamacpp"'),
                 named_tool_choice=False, top_k=True, tokenizer=("~/apply-template", "~/tokenize")),
    ProviderKind("sglang", "http://localhost:30000/v1", ("SGLANG_API_KEY",), ("SGLANG_URL",),
                 enabled_by="url", dialects=BOTH, native_gaps=GAPS, top_k=True),
    ProviderKind("openai", "https://api.openai.com/v1", ("OPENAI_API_KEY",), ("OPENAI_BASE_URL",),
                 responses_hosts=("api.openai.com",), **OPENAI),
    ProviderKind("anthropic", "https://api.anthropic.com/v1", ("ANTHROPIC_API_KEY",),
                 key_headers=("x-api-key",), headers=(("anthropic-version", "2023-06-01"),),
                 list_path="/models?limit=1000", dialects=("messages",), is_anthropic=True),
    ProviderKind("fireworks", "https://api.fireworks.ai/inference/v1", ("FIREWORKS_API_KEY",),
                 ("FIREWORKS_BASE_URL",), dialects=BOTH, native_gaps=("server_tool",), top_k=True,
                 stream_above=4096, format_with_tools=False),
    ProviderKind("together", "https://api.together.ai/v1", ("TOGETHER_API_KEY",),
                 ("TOGETHER_BASE_URL",), top_k=True),
    ProviderKind("groq", "https://api.groq.com/openai/v1", ("GROQ_API_KEY",), ("GROQ_BASE_URL",),
                 format_with_tools=False, max_tools=128),
    # "mantle" serves short ids alone, "runtime" inference profiles (us.*) and versions (*:0).
    ProviderKind("bedrock", "https://bedrock-mantle.${env.AWS_REGION|AWS_DEFAULT_REGION:="
                 "}.api.aws/v1", ("AWS_BEARER_TOKEN_BEDROCK", "AWS_BEDROCK_BEARER_TOKEN"),
                 signed=r"//(?:[\w-]+\.)?(bedrock(?:-mantle)?)[\w-]*\.([a-z0-9-]*)\.(?:vpce\.)?"
                        r"(?:amazonaws\.|api\.aws)", signed_by=("AWS_ACCESS_KEY_ID", "AWS_PROFILE"),
                 headers=(("anthropic-version", "2023-06-01"),), dialects=BOTH,
                 more_lists=(("~/inference-profiles?maxResults=1000&type=SYSTEM_DEFINED",
                              r"\.(anthropic|openai)\."),
                             ("~/foundation-models?byInferenceType=ON_DEMAND&byOutputModality=TEXT",
                              "^(anthropic|openai).*:")),
                 servers=((r"^~/(inf|found)", AWS_HOST, r"bedrock.\1.amazonaws.com"),
                          (r"^([a-z]{2}|us-gov|apac|amer|global)\.|:", AWS_HOST,
                           r"bedrock-runtime.\1.amazonaws.com/openai/v1")),
                 messages_path="~/anthropic/v1/messages", native_models=r"anthropic\."),
    ProviderKind("azure", "", ("AZURE_OPENAI_API_KEY", "AZURE_API_KEY"),
                 ("AZURE_OPENAI_ENDPOINT", "AZURE_API_BASE"), enabled_by="url",
                 default_path="/openai/v1", key_headers=("api-key",),
                 responses_hosts=(".openai.azure.com", ".cognitiveservices.azure.com",
                                  ".services.ai.azure.com"), **OPENAI),
    ProviderKind("gemini", "https://generativelanguage.googleapis.com/v1beta/openai",
                 ("GEMINI_API_KEY", "GOOGLE_API_KEY", "GEMINI_ACCESS_TOKEN"),
                 tool_call_extra=SKIP_SIGNATURE, root_unions=False, refused_keywords=(
                     "$schema", "propertyNames", "exclusiveMinimum", "exclusiveMaximum",
                     "patternProperties", "format")),
    ProviderKind("mistral", "https://api.mistral.ai/v1", ("MISTRAL_API_KEY",), tool_ids=NINE,
                 named_tool_choice=False, user_after_tool=False),
    ProviderKind("deepseek", "https://api.deepseek.com", ("DEEPSEEK_API_KEY",), default_path="",
                 dialects=BOTH, messages_path="~/anthropic/v1/messages",
                 native_gaps=(*GAPS, "image"), reasoning_echo="reasoning_content"),
    ProviderKind("moonshot", "https://api.moonshot.ai/v1", ("MOONSHOT_API_KEY",), dialects=BOTH,
                 messages_path="~/anthropic/v1/messages", native_gaps=GAPS,
                 reasoning_echo="reasoning_content"),
    ProviderKind("openrouter", "https://openrouter.ai/api/v1", ("OPENROUTER_API_KEY",),
                 dialects=BOTH, top_k=True, files=True),
    ProviderKind("zai", "https://api.z.ai/api/paas/v4", ("ZAI_API_KEY",), dialects=BOTH,
                 messages_path="~/api/anthropic/v1/messages", native_gaps=GAPS),
    ProviderKind("minimax", "https://api.minimax.io/v1", ("MINIMAX_API_KEY",), dialects=BOTH,
                 messages_path="~/anthropic/v1/messages", native_gaps=GAPS),
    ProviderKind("cerebras", "https://api.cerebras.ai/v1", ("CEREBRAS_API_KEY",),
                 ("CEREBRAS_BASE_URL",), list_path="/models?format=openrouter",
                 max_tokens_field="max_completion_tokens"),
    ProviderKind("xai", "https://api.x.ai/v1", ("XAI_API_KEY",)),
    ProviderKind("nvidia", "https://integrate.api.nvidia.com/v1", ("NVIDIA_API_KEY",),
                 ("NVIDIA_BASE_URL",)),
    ProviderKind("sambanova", "https://api.sambanova.ai/v1", ("SAMBANOVA_API_KEY",)),
    # Any other server, by its URL.
    ProviderKind("openai-compatible"),
    ProviderKind("messages", dialects=("messages",),
                 key_headers=("authorization", "x-api-key")))}
DEMO_KIND = ProviderKind("demo", "demo:", dialects=("demo",))


@dataclass(frozen=True)
class Provider:
    """One configured provider: its id is the first part of its models' ids."""

    id: str
    kind: ProviderKind
    base_url: str
    api_key: str = field(default="", repr=False)
    dialect: str = "auto"  # or the one dialect to speak
    verify: bool = True  # its TLS certificate
    ca_file: str = ""  # of a private certificate authority
    own_headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # lower-case names
    secrets: tuple[str, ...] = field(default=(), repr=False)  # besides the key

    @functools.cached_property
    def connection(self) -> str:
        """Scheme, host, port and trust: what connections to a provider may be shared by."""
        return f"{self.url('~')} {self.verify} {self.ca_file}"

    @functools.cached_property
    def headers(self) -> dict[str, str]:
        """What goes with each request, but for what a client, a proxy or a signature adds."""
        key = {name: "Bearer " * (name == "authorization") + self.api_key
               for name in self.kind.key_headers if self.api_key}
        return {"user-agent": f"ogx.py/{__version__}",
                "accept": "application/json, text/event-stream", "accept-encoding": "identity",
                **dict(self.kind.headers), **key, **dict(self.own_headers)}

    def at(self, place: str) -> Provider:
        """This provider at the server that has a model's id or a list's path."""
        urls = (re.sub(here, there, self.base_url) for pattern, here, there in self.kind.servers
                if re.search(pattern, place))
        return replace(self, base_url=next(urls, self.base_url)) if self.kind.servers else self

    def url(self, path: str) -> str:
        """The URL of a path below the base URL or, after a ~, below the server's root."""
        if path.startswith("~"):
            return "/".join(self.base_url.split("/")[:3]) + path[1:]
        return self.base_url + path


DEMO_PROVIDER = Provider("demo", DEMO_KIND, DEMO_KIND.base_url)

# ======== Config =============================================================================
# In: the starter below or a JSON file of the same shape, and the environment. Out: a Config, or
# an OgxError that names the file, the path inside it and what was expected. Pure.

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8321
TIERS = ("haiku", "sonnet", "opus", "fable")
ENV_REFERENCE = re.compile(r"\$\{env\.([A-Za-z0-9_|]+)(?:(:=|:\+)([^{}]*))?\}")
AROUND = " \t\r\n\"'"  # a value, left there by files and shells
# A user's own header, name and value; those that frame a request are ours.
HEADER = re.compile(r"(?!host\n|connection\n|content-|transfer-)[a-z0-9!#$%&'*+.^_`|~-]+\n[ -~]*")
STARTER_ALIASES = ("claude-haiku-4-5-20251001", "claude-sonnet-4-5-20250514",
                   "claude-opus-4-6-20260314")


@dataclass(frozen=True)
class Alias:
    """A registered model id: provider_id may be "all", provider_model_id "auto". `targets` are
    ids of models in the order they are tried, where it names several."""

    model_id: str
    provider_id: str
    provider_model_id: str
    targets: tuple[str, ...] = ()


def limit(default: float, words: str) -> Any:
    return field(default=default, metadata={"words": words})


@dataclass(frozen=True)
class Limits:
    """What no other side can exceed: `server.NAME` in the configuration, else OGX_NAME."""

    connect_timeout: float = limit(10, "seconds to connect to a provider")
    first_byte_timeout: float = limit(600, "seconds of silence before an answer begins")
    idle_timeout: float = limit(300, "seconds of silence within an answer")
    client_timeout: float = limit(30, "seconds for a client to send its request, or read on")
    drain_timeout: float = limit(30, "seconds for running answers after a signal to stop")
    max_body: float = limit(32, "megabytes of a request, after decompression")
    max_requests: float = limit(1000, "requests that run at once; others get a 529")
    max_idle: float = limit(1000, "idle connections of clients; the oldest are closed first")


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
    host_names: tuple[str, ...] = ()  # that clients may call the server by, in lower case
    show_thinking: bool = True  # where a client asks to omit it, as Claude Code does, too


def starter_config() -> Json:
    """The built-in configuration; starter.json holds the same (a test compares them)."""
    lines = []
    for kind in sorted(PROVIDER_KINDS.values(), key=lambda kind: kind.signed):
        keys, urls = "|".join(kind.key_vars), "|".join(kind.url_vars)
        switches, verify = "|".join(kind.switches), kind.verify_var
        settings = {"base_url": f"${{env.{urls}:={kind.base_url}}}" if urls else kind.base_url,
                    "api_key": f"${{env.{keys}:=}}",
                    **({"verify": f"${{env.{verify}:=true}}"} if verify else {})}
        if switches:  # by which it is on
            lines.append({"provider_id": f"${{env.{switches}:+{kind.name}}}",
                          "provider_type": f"remote::{kind.name}", "config": settings})
    alias = {"provider_id": "all", "provider_model_id": "auto", "model_type": "llm"}
    models = [{"model_id": model_id, **alias} for model_id in STARTER_ALIASES]
    return {
        "version": 2, "distro_name": "starter",
        "providers": {"inference": lines},
        "registered_resources": {"models": models},
        "server": {"host": DEFAULT_HOST, "port": DEFAULT_PORT, "discover_local": True}}


def config_from_json(tree: Any, source: str, environ: Mapping[str, str]) -> Config:
    """The Config a parsed file describes; raises OgxError(400) naming the wrong place."""
    root = Node(expanded(tree, environ, source), source)
    root.only("version", "distro_name", "providers", "registered_resources", "server")
    server = root.child("server")
    own = ("host", "port", "discover_local", "retries", "retry_seconds", "host_names")
    server.only(*own, "show_thinking", *asdict(Limits()))
    entries = root.child("providers").items("inference")
    providers = [p for p in (provider_from_node(entry) for entry in entries) if p]
    ids = [provider.id for provider in providers]
    for provider_id in ids:
        if ids.count(provider_id) > 1:
            raise OgxError(400, f"{source}: two providers have the provider_id '{provider_id}'")
    entries = root.child("registered_resources").items("models")
    aliases = [alias_from_node(entry, ids) for entry in entries]
    tiers = {tier: environ.get(f"ANTHROPIC_DEFAULT_{tier.upper()}_MODEL", "") for tier in TIERS}
    port = port_number(server.value("port", DEFAULT_PORT), server.path("port"))
    port = port_number(environ.get("OGX_PORT") or port, "OGX_PORT")
    variables = Node({name: value for name, value in environ.items() if value}, "environment")
    limits = Limits(**{name: variables.number(f"OGX_{name.upper()}", server.number(name, usual))
                       for name, usual in asdict(Limits()).items()})
    return Config(
        server.text("host", DEFAULT_HOST), port, tuple(providers), tuple(aliases), tiers,
        server.flag("discover_local", True), int(server.number("retries", 3)),
        server.number("retry_seconds", 5.0), limits,
        tuple(server.text("host_names", "").lower().replace(",", " ").split()),
        server.flag("show_thinking", True))


def expanded(node: Any, environ: Mapping[str, str], where: str) -> Any:
    """The tree with each `${env.VAR}`, `${env.VAR:=default}` and `${env.VAR:+value}` replaced.
    As in OGX, an empty variable counts as unset. `A|B` stands for the first of them that is set."""
    if isinstance(node, dict):
        dot = "." if ": " in where else ": "
        return {k: expanded(v, environ, f"{where}{dot}{k}") for k, v in node.items()}
    if isinstance(node, list):
        return [expanded(v, environ, f"{where}[{i}]") for i, v in enumerate(node)]
    if not isinstance(node, str):
        return node
    used: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        names, operator, operand = match.groups()
        name = next((n for n in names.split("|") if environ.get(n)), "")
        if operator == ":+":
            return operand if name else ""
        if not name and operator is None:
            raise OgxError(400, f"{where}: the environment variable {names} is not set")
        used.extend([name] if name else [])
        return environ[name] if name else operand

    inside = ENV_REFERENCE.sub(replaced, node)  # a default may itself hold one reference
    told = FromVariable(ENV_REFERENCE.sub(replaced, inside) if inside != node else node)
    told.variable = "".join(used[:1])
    return told


class FromVariable(str):
    """A text, and the variable that gave it, if one did."""

    variable = ""


class Node:
    """A place in the configuration tree: reads typed values, names the path of a wrong one."""

    def __init__(self, value: Any, where: str) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise self.wrong("", "an object", value)
        self.fields = value

    def path(self, key: str) -> str:
        """Its place, or the variable that it came from."""
        dot = "." if ": " in self.where else ": "
        return getattr(self.fields.get(key), "variable", "") or f"{self.where}{dot}{key}"

    def wrong(self, key: str, expected: str, value: Any) -> OgxError:
        place = self.path(key) if key else self.where
        hidden = key == "api_key" or value and isinstance(value, (dict, list))  # it may hold a key
        shown = "something else" if hidden else json.dumps(value)[:80]
        return OgxError(400, f"{place}: expected {expected}, got {shown}")

    def only(self, *keys: str) -> None:
        for key in self.fields:
            if key not in keys:
                raise OgxError(400, f"{self.path(key)}: unknown key, expected {', '.join(keys)}")

    def value(self, key: str, default: Any) -> Any:
        value = self.fields.get(key)
        return default if value is None else value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value(key, default)
        if not isinstance(value, str) or (default is None and not value):
            raise self.wrong(key, "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if str(value).lower() not in ("true", "false"):
            raise self.wrong(key, "true or false", value)
        return str(value).lower() == "true"

    def number(self, key: str, default: float) -> float:
        given = self.value(key, default)
        value = json_or_none(given) if isinstance(given, str) else given
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
            raise self.wrong(key, "a number from 0 to 999999 (run --help tells its unit)", given)
        return float(value)

    def child(self, key: str) -> Node:
        return Node(self.value(key, {}), self.path(key))

    def items(self, key: str) -> list[Node]:
        value = self.value(key, [])
        if not isinstance(value, list):
            raise self.wrong(key, "a list", value)
        return [Node(item, f"{self.path(key)}[{i}]") for i, item in enumerate(value)]


def provider_from_node(node: Node) -> Provider | None:
    """A configured provider, or None for an entry whose provider_id is empty (switched off)."""
    node.only("provider_id", "provider_type", "config")
    provider_id = node.text("provider_id", "")
    if not provider_id:
        return None
    if not re.fullmatch(r"[A-Za-z0-9._-]+", provider_id):
        raise node.wrong("provider_id", "letters, digits, '.', '_' or '-'", provider_id)
    type_name = node.text("provider_type")
    kind = PROVIDER_KINDS.get(type_name.partition("remote::")[2])
    if kind is None:
        known = ", ".join(f"remote::{name}" for name in PROVIDER_KINDS)
        raise node.wrong("provider_type", f"one of {known}", type_name)
    settings = node.child("config")
    settings.only("base_url", "api_key", "dialect", "verify", "ca_file", "headers", "key_header")
    api_key = settings.text("api_key", "").strip(AROUND)
    if re.search(r"[^\x21-\x7e]", api_key):
        place = settings.path("api_key")
        raise OgxError(400, f"{place}: expected a key of printable ASCII without spaces")
    dialect = settings.text("dialect", "auto")
    if dialect not in ("auto", "responses", *BOTH):
        raise settings.wrong("dialect", '"auto", "messages", "chat" or "responses"', dialect)
    url, parts = checked_base_url(settings, kind)
    headers = checked_headers(settings, api_key)
    if parts.username is not None:
        headers = {"authorization": basic_auth(parts), **headers}
    if settings.text("key_header", ""):
        kind = replace(kind, key_headers=())
    secrets = [parts.password or "", urllib.parse.unquote(parts.password or ""), *headers.values()]
    return Provider(
        provider_id, kind, url, api_key, dialect, settings.flag("verify", True),
        settings.text("ca_file", ""), tuple(headers.items()),
        (*secrets, *" ".join(secrets).split()))


def basic_auth(url: urllib.parse.SplitResult) -> str:
    """A URL's user and password as a header has them."""
    pair = urllib.parse.unquote(f"{url.username}:{url.password or ''}")
    return "Basic " + binascii.b2a_base64(pair.encode(), newline=False).decode()


def checked_headers(node: Node, key: str) -> dict[str, str]:
    """The user's own headers by lower-case name, the one for the key included."""
    given, name = node.child("headers"), node.text("key_header", "")
    told = [(given.path(n), n.lower(), given.text(n, "").strip()) for n in given.fields]
    told += [(node.path("key_header"), name.lower(), key)] if name else []
    for place, name, value in told:
        if not HEADER.fullmatch(f"{name}\n{value}"):
            words = "a header of printable ASCII that doesn't frame the request"
            raise OgxError(400, f"{BAD_ID.sub('?', place)}: expected {words}")
    return {name: value for _, name, value in told if value}


def checked_base_url(node: Node, kind: ProviderKind) -> tuple[str, urllib.parse.SplitResult]:
    """The URL without its user and a trailing slash, and all its parts. Without a scheme it gets
    `http://` where servers are local or it has a port, without a path the usual one."""
    url = node.text("base_url", "").strip(AROUND) or kind.base_url
    bare = url and "://" not in url
    if bare and (kind.enabled_by == "url" or re.match("[^/]+:[0-9]", url)):
        url = "http://" + url
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or re.search("[^!-~]|[?#]", url):
        before, _, rest = url.rpartition("@")  # before it may be a password, behind a ? a key
        shown, *query = re.split("[?#]", rest)
        words = "a URL that ends before ? and #" if query else "a URL like http://localhost:8000/v1"
        raise node.wrong("base_url", words, "***@" * bool(before) + shown)
    path = parts.path.rstrip("/")
    for ending in ("/chat/completions", "/messages"):
        path = path.removesuffix(ending).rstrip("/")
    usual = urllib.parse.urlsplit(kind.base_url).path or kind.default_path
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path or usual}", parts


def alias_from_node(node: Node, provider_ids: Sequence[str]) -> Alias:
    node.only("model_id", "provider_id", "provider_model_id", "model_type")
    if node.text("model_type", "llm") != "llm":
        raise node.wrong("model_type", '"llm"', node.fields["model_type"])
    provider_id = node.text("provider_id", "all")
    if provider_id != "all" and provider_id not in provider_ids:
        expected = ", ".join(sorted([*provider_ids, "all"]))
        raise node.wrong("provider_id", f"a configured provider ({expected})", provider_id)
    targets = node.fields.get("provider_model_id")
    if isinstance(targets, list):
        if not targets or not all(isinstance(t, str) and t for t in targets):
            raise node.wrong("provider_model_id", "a model's id or a list of them", targets)
        return Alias(node.text("model_id"), "all", targets[0], tuple(targets))
    return Alias(node.text("model_id"), provider_id, node.text("provider_model_id", "auto"))


def port_number(value: Any, where: str) -> int:
    """A TCP port from a number or its digits; 0 lets the system choose."""
    if re.fullmatch("[0-9]{1,5}", str(value)) and int(value) <= 65535:
        return int(value)
    raise OgxError(400, f"{where}: expected a port from 0 to 65535, got {json.dumps(value)[:80]}")


# ======== Registry ===========================================================================
# Which provider serves a model id. Lists come in from discovery; nothing here does I/O, so every
# answer is computed when asked and heals by itself when a provider comes or goes.

# Ids that aren't chat models, for lists that don't say; found with public model maps.
NOT_LLM = re.compile(
    r"embed|rerank|whisper|transcri|(^|[-_./])tts|speech|audio|realtime|dall-?e|(^|[-_./])image|"
    r"imagen|flux|stable-diffusion|sdxl|canvas|nano-banana|moderation|guard|ocr|sora|"
    r"(^|[-_./])veo|video|t2v|i2v|lyria|bge-|gte-|(^|[-_./])e5-|minilm|colbert|nomic|jina-|"
    r"voyage-|m2-bert|davinci-00|babbage|orpheus|playai|kokoro|parakeet|scribe|chirp|reward|"
    r"computer-use|deep-research|search-(api|preview)", re.I)
# Fields of list entries with the context window and the output limit, in tokens: Anthropic, vLLM,
# Groq, Together and OpenRouter, LM Studio, Mistral, Fireworks, llama.cpp.
CONTEXT_FIELDS = ("max_input_tokens", "max_model_len", "context_window", "context_length",
                  "loaded_context_length", "max_context_length", "contextLength",
                  "n_ctx")
ID_FIELDS = ("id", "name", "inferenceProfileId", "modelId")
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
    warning: str = ""  # what keeps it from working well

    @functools.cached_property
    def served(self) -> str:
        """The id its provider lists it by, whatever it was asked as."""
        return f"{self.provider.id}/{self.upstream_id}"

    @property
    def origin(self) -> str:
        """Where its answers come from, in words."""
        return f"{self.provider.id}, model {self.upstream_id}"


def models_from_list(provider: Provider, payload: Any) -> list[Model]:
    """The LLMs of a provider's model list: {"data": [...]}, {"models": [...]} or a bare list."""
    if isinstance(payload, dict):
        names = ("data", "models", "inferenceProfileSummaries", "modelSummaries")
        payload = next((payload[name] for name in names if payload.get(name)), [])
    models: dict[str, Model] = {}
    for entry in map(dict_or_empty, payload if isinstance(payload, list) else ()):
        upstream_id = next((entry[name] for name in ID_FIELDS if entry.get(name)), None)
        if (not isinstance(upstream_id, str) or len(upstream_id) > MAX_ID
                or BAD_ID.search(upstream_id) or not is_llm(upstream_id, entry)):
            continue
        upstream_id = re.sub("^models/", "", upstream_id)
        created = first_number(entry, ("created",)) or 0
        limits = {**entry, **dict_or_empty(entry.get("meta")),
                  **dict_or_empty(entry.get("top_provider"))}
        models.setdefault(upstream_id, Model(
            f"{provider.id}/{upstream_id}", provider.at(upstream_id), upstream_id,
            created if created < 1 << 32 else 0,
            first_number(limits, CONTEXT_FIELDS), first_number(limits, OUTPUT_FIELDS)))
    # The newest first, but those called "pro" last, which tend to be slow and dear: the first one
    # is what a tier means where nothing else is chosen.
    return sorted(models.values(), key=lambda m: (bool(PRO.search(m.upstream_id)), -m.created))


def is_llm(upstream_id: str, entry: Json) -> bool:
    """Whether a list entry is a chat model: by the provider's own fields, else by its name."""
    if entry.get("type") in ("llm", "vlm"):  # LM Studio
        return True
    capabilities = entry.get("capabilities")
    if isinstance(capabilities, dict) and "completion_chat" in capabilities:
        return bool(capabilities["completion_chat"])
    if isinstance(capabilities, list) and capabilities:
        return "completion" in capabilities
    if NOT_LLM.search(str(entry.get("type"))) or entry.get("supports_chat") is False:
        return False
    modalities = dict_or_empty(entry.get("architecture")).get("output_modalities")
    if isinstance(modalities, list) and "text" not in modalities:
        return False
    return not NOT_LLM.search(upstream_id)


def first_number(fields: Json, names: Iterable[str]) -> int | None:
    """The first positive whole number among the named fields."""
    return next(filter(None, (whole_number(fields.get(name)) for name in names)), None)


class Registry:
    def __init__(self, config: Config) -> None:
        self.providers = {p.id: p for p in config.providers}
        self.aliases = {alias.model_id: alias for alias in config.aliases}
        self.tiers = dict(config.tiers)
        self.lists: dict[str, list[Model]] = {}  # provider id -> its LLMs
        self.problems: dict[str, str] = {}  # provider id -> what was wrong at the last asking
        self.native: dict[str, bool] = {}  # provider id -> whether it has a Messages API
        self.uncounted: dict[str, set[str]] = {}  # base URL -> paths where it counts no tokens
        self._by_id: dict[str, Model] = {}
        self._lock = threading.Lock()

    def adopt(self, providers: Sequence[Provider]) -> None:
        """Take in the providers found when none was configured; without any, the demo model."""
        self.providers = {p.id: p for p in providers or [DEMO_PROVIDER]}

    def learn(self, provider_id: str, models: list[Model] | None, problem: str) -> None:
        """Take in what a provider's list said; None keeps the old list. Readers see a change as
        a whole, since both tables are replaced and never altered."""
        with self._lock:
            if models is not None:
                self.lists = {**self.lists, provider_id: models}
                self._by_id = {model.id: model for model in self.models()}
            problems = {**self.problems, provider_id: problem}
            self.problems = {k: v for k, v in problems.items() if v}

    def models(self) -> list[Model]:
        """All listed LLMs in the order of the providers."""
        return [model for pid in self.providers for model in self.lists.get(pid, [])]

    def listed(self, model: Model) -> Model | None:
        """The model as its provider lists it."""
        return self._by_id.get(model.served)

    def resolve(self, model_id: str) -> Model:
        """The model that serves an id; OgxError(404) when none does."""
        return self.chain(model_id)[0]

    def chain(self, model_id: str) -> list[Model]:
        """The models to try for an id, in order; OgxError(404) when there is none.
        An alias may name several. Others have one, in this order: a listed id; an alias with a
        fixed target; a tier chosen by ANTHROPIC_DEFAULT_*_MODEL; an upstream's bare id where only
        one provider has it; an alias for `auto`, and any `claude-*` id by its family, which both
        mean the first LLM, or the first of that family; `provider/anything`; `anyone/claude-*`."""
        wanted = model_id.strip().removesuffix("[1m]")
        alias = self.aliases.get(wanted)
        if alias and alias.provider_id not in (*self.providers, "all"):
            gone = alias.provider_id
            raise OgxError(404, f"the provider '{gone}' of model '{wanted}' is not configured")
        if alias and alias.targets:
            found = [self._named(t) or self._bare(t) or self._routed(t) for t in alias.targets]
        else:
            found = [self._named(wanted) or self._by_tier(wanted) or self._bare(wanted)
                     or self._automatic(wanted) or self._routed(wanted)]
        models = [m if m.id == model_id else replace(m, id=model_id) for m in found if m]
        if not models and alias:
            raise OgxError(404, f"no provider serves a target of model '{wanted[:200]}'")
        claude = re.search("(?<=[./:])claude-.*", wanted)  # behind its vendor
        if not models and claude:
            return [replace(model, id=model_id) for model in self.chain(claude[0])]
        if not models:
            hint = near_miss(model_id, [*(m.id for m in self.models()), *self.aliases])
            words = f"model '{model_id[:200]}' not found.{hint}"
            raise OgxError(404, f"{words} GET /v1/models lists what there is.")
        return models

    def _named(self, wanted: str) -> Model | None:
        if wanted in self._by_id:
            return self._by_id[wanted]
        alias = self.aliases.get(wanted)
        if alias and alias.provider_model_id != "auto" and alias.provider_id != "all":
            return self._routed(f"{alias.provider_id}/{alias.provider_model_id}")
        return None

    def _by_tier(self, wanted: str) -> Model | None:
        tier = tier_of(wanted)
        chosen = self.tiers.get(tier or "", "").removesuffix("[1m]")
        if not chosen or chosen == wanted:
            return None
        found = self._named(chosen) or self._bare(chosen) or self._routed(chosen)
        if found is None and not tier_of(chosen):  # one that names a tier would go in circles
            variable = f"ANTHROPIC_DEFAULT_{str(tier).upper()}_MODEL"
            raise OgxError(404, f"{variable} names '{chosen[:200]}', which no provider here serves")
        return found

    def _automatic(self, wanted: str) -> Model | None:
        alias, tier = self.aliases.get(wanted), tier_of(wanted)
        if alias is None and not tier and not wanted.startswith("claude-"):
            return None
        if alias is None or alias.provider_id == "all":
            # Those of providers that were down at the last asking come last.
            candidates = sorted(self.models(), key=lambda m: m.provider.id in self.problems)
        else:
            candidates = self.lists.get(alias.provider_id, [])
        if alias and alias.provider_model_id != "auto":
            candidates = [m for m in candidates if m.upstream_id == alias.provider_model_id]
        if not candidates:
            reasons = "; ".join(f"{pid}: {why}" for pid, why in self.problems.items())
            reasons = reasons or "no provider lists a model"
            raise OgxError(404, f"no model to serve '{wanted[:200]}' ({reasons})")
        family = (m for m in candidates if m.provider.id == candidates[0].provider.id
                  and tier_of(re.sub(r"^.*\.(?=claude-)", "", m.upstream_id)) == tier)
        return next(family, candidates[0]) if tier else candidates[0]

    def _bare(self, wanted: str) -> Model | None:
        same = [m for m in self.models() if m.upstream_id == wanted]
        return same[0] if len(same) == 1 else None

    def _routed(self, wanted: str) -> Model | None:
        provider_id, slash, rest = wanted.partition("/")
        if slash and rest and provider_id in self.providers:
            listed = (m for m in self.lists.get(provider_id, []) if m.upstream_id == rest)
            return next(listed, Model(wanted, self.providers[provider_id].at(rest), rest))
        return None


def near_miss(word: str, known: Iterable[str]) -> str:
    """` Did you mean '...'?` where a known id is near to the word, else nothing."""
    import difflib  # only now, to start sooner and smaller

    # Comparing takes long: only with the ids that have most words in common.
    words = set(re.findall(r"[a-z]+|[0-9]+", word[:MAX_ID].lower()))
    common = ((len(words.intersection(re.findall(r"[a-z]+|[0-9]+", other.lower()))), other)
              for other in itertools.islice(known, 5000))
    best = [other for _, other in sorted(common, reverse=True)[:20]]
    near = difflib.get_close_matches(word[:MAX_ID], best, 1, 0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def tier_of(model_id: str) -> str | None:
    """The tier in a Claude model's id of any version or date: claude-3-5-haiku-latest -> haiku."""
    if model_id.startswith("claude-"):
        return next((tier for tier in TIERS if tier in model_id), None)
    return model_id if model_id in TIERS else None


# ======== Requests ===========================================================================
# What holds for a Messages request whatever the upstream speaks: its shape is checked once, its
# history becomes turns that every provider accepts, odd blocks become text. Pure.

# Block types of Anthropic's OpenAPI and of its SDK 2.12 (messages and their betas, November 2026).
BLOCK_TYPES = frozenset((
    "text", "image", "document", "search_result", "thinking", "redacted_thinking", "tool_use",
    "tool_result", "tool_reference", "tool_addition", "tool_removal", "server_tool_use",
    "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
    "bash_code_execution_tool_result", "text_editor_code_execution_tool_result",
    "tool_search_tool_result", "advisor_tool_result", "mcp_tool_use", "mcp_tool_result",
    "mcp_tool_listing", "container_upload", "compaction", "fallback"))
UNSEEN_BLOCKS = ("thinking", "redacted_thinking", "mcp_tool_listing", "fallback")
SIGNATURE_MARK = '{"ogx":'  # begins the signatures that we made: JSON with what goes back upstream
MAX_STOPS = 4000  # characters of all stop sequences
CONTENT, NUMBER = (str, list), (int, float)
MESSAGE_FIELDS = {"role": ("user", "assistant", "system"), "content": CONTENT}
BLOCK_FIELDS: dict[str, dict[str, type]] = {  # what translation relies on
    "text": {"text": str}, "image": {"source": dict}, "document": {"source": dict},
    "thinking": {"thinking": str}, "tool_use": {"id": str, "name": str, "input": dict},
    "tool_result": {"tool_use_id": str}, "search_result": {"content": list}}
SOURCE_FIELDS: dict[str, Json] = {
    "base64": {"media_type": str, "data": str}, "url": {"url": str}, "text": {"data": str},
    "file": {"file_id": str}, "content": {"content": CONTENT}}
TOOL_FIELDS = {"input_schema": dict, "type": str, "description": str}
OPTIONS = {"tools": list, "tool_choice": dict, "stop_sequences": list, "stream": bool,
           "temperature": NUMBER, "top_p": NUMBER, "top_k": int, "thinking": dict,
           "output_config": dict, "output_format": dict, "metadata": dict,
           "system": CONTENT}
KEEP_THOUGHTS = ("context_management", {"edits": [
    {"type": "clear_thinking_20251015", "keep": "all"}]})
EFFORTS = ("low", "medium", "high", "xhigh", "max")
KIND_NAMES = {str: "a string", list: "a list", dict: "an object", int: "a whole number",
              float: "a number", bool: "true or false", type(None): "null", NUMBER: "a number",
              CONTENT: "a string or a list of content blocks"}
PLACEHOLDER = "DeferredToolPlaceholder"  # Claude Code's; stands for tools that may be found later
BILLING_HEADER = "x-anthropic-billing-header:"  # varies per prompt and would spoil prefix caches
NO_RESULT = "[No result: the tool call was interrupted before it answered.]"
TOOL_ERROR = "[The tool reported an error]\n"
GO_ON = "[Go on from the very end of your last message, and repeat nothing of it.]"


def finite_number(text: str) -> float:
    """The number; ValueError for Python's NaN and Infinity, which 1e999 is too."""
    number = float(text)
    if math.isfinite(number):
        return number
    raise ValueError(f"{text} is no number of JSON")


STRICT_JSON = json.JSONDecoder(parse_constant=finite_number, parse_float=finite_number)


def parsed_json(body: bytes) -> Any:
    """The JSON of a request's body; OgxError(400) says where it breaks."""
    if not body:
        raise OgxError(400, "the request has no body; expected a JSON object")
    if has_too_many_elements(body):
        raise OgxError(413, f"the request's JSON has more than {MAX_ELEMENTS:,} elements")
    try:
        # As "utf-8-sig", but without its detour through Python.
        return STRICT_JSON.decode(body.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError:
        raise OgxError(400, "the request's body is not UTF-8") from None
    except ValueError as error:
        raise OgxError(400, f"the request's body is not JSON: {error}") from None


def checked_json(body: bytes, counting: bool = False) -> Json:
    """The Messages request in a body."""
    request: Json = parsed_json(body)
    check_request(request, counting)
    return request


COMPACT_JSON = json.JSONEncoder(separators=(",", ":"), check_circular=False)


def json_bytes(value: Json) -> bytes:
    return COMPACT_JSON.encode(value).encode("ascii")


HALF_PAIR = re.compile(rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|"
                       rb"(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F]..)")


def without_halves(data: bytes) -> bytes:
    """JSON with U+FFFD for half surrogate pairs: servers refuse a whole body for one."""
    if not HALF_PAIR.search(data):
        return data
    marked = data.replace(b"\\\\", b"\0")  # what is a text's own backslash
    return HALF_PAIR.sub(rb"\\ufffd", marked).replace(b"\0", b"\\\\")


def check_request(body: Any, counting: bool = False) -> None:
    """Raise OgxError(400) with one sentence about the first wrong field of a Messages request.
    Unknown fields are accepted. `counting` is for count_tokens, which has no max_tokens."""
    expect(body, "", {"model": str})
    if not body["model"].strip() or len(body["model"]) > MAX_ID or BAD_ID.search(body["model"]):
        raise OgxError(400, f"model: expected 1 to {MAX_ID} characters, none of them a control "
                            "character")
    expect(body, "", {"messages": list} if counting else {"messages": list, "max_tokens": int})
    if not counting and body["max_tokens"] < 1:
        raise OgxError(400, f"max_tokens: expected at least 1, got {body['max_tokens']}")
    if not body["messages"]:
        raise OgxError(400, "messages: expected at least one message")
    for index, message in enumerate(body["messages"]):
        where = f"messages.{index}"
        if isinstance(message, dict) and message.get("role") == "system":
            message.setdefault("content", [])  # it may hold nothing but an output_config
        expect(message, where, MESSAGE_FIELDS)
        if "output_config" in message:
            expect(message, where, {"output_config": dict}, required=False)
        check_blocks(message["content"], f"{where}.content")
    check_options(body)
    check_blocks(body.get("system"), "system")


def check_blocks(content: Any, where: str) -> None:
    """The blocks of a content that isn't a string; tool results with their own included."""
    for index, block in enumerate(content if isinstance(content, list) else ()):
        here = f"{where}.{index}"
        if not isinstance(block, dict):
            raise wrong(here, "a content block", block)
        kind = block.get("type")
        if not isinstance(kind, str):
            shown = json.dumps(kind)[:80]
            raise OgxError(400, f"{here}.type: expected the type of a content block, got {shown}")
        if kind in BLOCK_FIELDS:
            expect(block, here, BLOCK_FIELDS[kind])
        if kind in ("tool_result", "search_result"):
            expect(block, here, {"content": CONTENT}, required=False)
            check_blocks(block.get("content"), f"{here}.content")
        elif kind in ("image", "document"):
            here, source = f"{here}.source", block["source"]
            expect(source, here, {"type": tuple(SOURCE_FIELDS)})
            expect(source, here, SOURCE_FIELDS[source["type"]])
            if source["type"] == "content":
                check_blocks(source["content"], f"{here}.content")


def check_options(body: Json) -> None:
    expect(body, "", OPTIONS, required=False)
    for index, tool in enumerate(body.get("tools") or ()):
        where = f"tools.{index}"
        expect(tool, where, TOOL_FIELDS, required=False)
        expect(tool, where, {"name": str}, required=is_client_tool(tool))
    for index, sequence in enumerate(body.get("stop_sequences") or ()):
        if not isinstance(sequence, str) or not sequence:
            raise OgxError(400, f"stop_sequences.{index}: expected a string that isn't empty")
    if sum(map(len, body.get("stop_sequences") or ())) > MAX_STOPS:  # each piece is searched
        raise OgxError(400, f"stop_sequences: expected at most {MAX_STOPS} characters in all")
    if body.get("output_format"):  # the older name
        config = {"format": body["output_format"], **(body.get("output_config") or {})}
        body["output_config"] = config
    choice, config = body.get("tool_choice"), body.get("output_config") or {}
    if choice:
        expect(choice, "tool_choice", {"type": ("auto", "any", "tool", "none")})
        expect(choice, "tool_choice", {"name": str}, required=choice["type"] == "tool")
    if config:
        expect(config, "output_config", {"effort": str, "format": dict}, required=False)
    output_format = config.get("format") or {}
    if output_format.get("type") == "json_schema":
        expect(output_format, "output_config.format", {"schema": dict})


def is_client_tool(tool: Json) -> bool:
    """Whether the client runs the tool: custom tools, and Anthropic's with a schema of its own."""
    if tool.get("name") == PLACEHOLDER:
        return False
    return tool.get("type") in (None, "custom") or "input_schema" in tool


def expect(node: Any, where: str, kinds: Mapping[str, Any], required: bool = True) -> None:
    """Check the fields of an object, the request's body where it has no place: each is of a type,
    or among some types or words. Null counts as absent."""
    if type(node) is not dict:
        raise wrong(where or "the request body", "an object" if where else "a JSON object", node)
    for name in kinds if required else sorted(kinds.keys() & node.keys()):
        kind, value = kinds[name], node.get(name)
        if type(value) is kind or (value is None and not required):
            continue
        if isinstance(kind, tuple) and (value in kind or type(value) in kind):
            continue
        place = f"{where}.{name}" if where else name
        if value is None:
            raise OgxError(400, f"{place}: field required")
        if kind not in KIND_NAMES:
            shown = json.dumps(value)[:80]
            raise OgxError(400, f"{place}: expected one of {', '.join(kind)}, got {shown}")
        raise wrong(place, KIND_NAMES[kind], value)


def wrong(where: str, expected: str, value: Any) -> OgxError:
    return OgxError(400, f"{where}: expected {expected}, got {KIND_NAMES[type(value)]}")


def refuse_untranslatable(body: Json, native: bool = False) -> None:
    """Refuse what only Anthropic can honour, in the words that the clients' recovery looks for.
    The SDK's tool runner goes on without server-side threads when it reads this error code;
    Claude Code checks tool calls by ordinary requests when a 400 names `safeguards`. A verdict
    must never be made up, so ignoring the field is no option."""
    if body.get("thread"):
        words = "thread: server-side threads are not supported here; send the whole conversation"
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise OgxError(400, words, details=details)
    for name in ("safeguards", *(() if native else ("mcp_servers", "container"))):
        if body.get(name):
            raise OgxError(400, f"{name}: not supported by translated models")
    config = body.get("output_config") or {}
    if config.get("effort"):
        expect(config, "output_config", {"effort": EFFORTS})
    if config.get("format"):
        expect(config["format"], "output_config.format", {"type": ("json_schema",)})
    for index, message in enumerate(body["messages"]):
        for place, block in enumerate(blocks_of(message["content"])):
            if block["type"] not in BLOCK_TYPES:
                where, shown = f"messages.{index}.content.{place}", json.dumps(block["type"])[:80]
                raise OgxError(400, f"{where}.type: {shown} is not a known type of content block")


def dropped_names(request: Json, sent: Json, all_of_them: bool) -> str:
    """What a translated request leaves out, for the log; Claude Code's usual only on demand."""
    usual = () if all_of_them else (("betas", request.get("betas")), KEEP_THOUGHTS)
    known = {*OPTIONS, "model", "messages", "max_tokens"} - ({"top_k"} - sent.keys())
    names = [name for name, value in request.items()
             if not (name in known or value is None or (name, value) in usual)]
    return ", ".join(BAD_ID.sub("?", name[:40]) for name in names[:10])


def registered_alias(body: Any, registry: Registry) -> Alias:
    """The alias that a POST /v1/models asks for; OgxError 400 or 409."""
    expect(body, "", {"model_id": str})
    names = ("model_id", "provider_id", "provider_model_id", "model_type")
    given = {name: body[name] for name in names if body.get(name) not in (None, "")}
    alias = alias_from_node(Node(given, "the model"), list(registry.providers))
    targets = alias.targets or (alias.provider_model_id,)
    if len(targets) > 32 or max(map(len, targets)) > MAX_ID:
        raise OgxError(400, f"provider_model_id: expected an id of 1 to {MAX_ID} characters, or a "
                            "list of at most 32 of them")
    if not re.fullmatch(r"\S(.{0,254}\S)?", alias.model_id) or BAD_ID.search(alias.model_id):
        raise OgxError(400, "model_id: expected 1 to 256 characters without control characters or "
                            "outer spaces")
    if any(model.id == alias.model_id for model in registry.models()):
        raise OgxError(409, f"model_id: '{alias.model_id}' is a provider's own id")
    if len({*registry.aliases, alias.model_id}) > MOST_REGISTERED:
        raise OgxError(400, f"model_id: {MOST_REGISTERED} are registered; delete one before")
    return alias


def blocks_of(content: Any) -> list[Json]:
    """Content as a list of blocks, without empty texts, which most providers refuse; a document's
    images follow it."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    blocks = [b for b in content or () if b["type"] != "text" or b["text"]]
    for source in [b["source"] for b in blocks if b["type"] == "document"]:
        if source["type"] == "content" and isinstance(source["content"], list):
            blocks += [block for block in source["content"] if block["type"] == "image"]
    return blocks


def system_text(request: Json) -> str:
    """The system prompt as one text, without Claude Code's billing header."""
    texts = [block_text(b) for b in blocks_of(request.get("system"))]
    return "\n\n".join(t for t in texts if not t.startswith(BILLING_HEADER))


def text_part(text: str) -> Json:
    return {"type": "text", "text": text}


@dataclass
class Turn:
    """A step of the repaired history. `results` holds tool_result blocks, one for each tool_use
    of the assistant turn before it and in that order."""

    role: str  # assistant, results, user or system
    blocks: list[Json]


def turns_from_messages(messages: Sequence[Json], system_anywhere: bool = True) -> list[Turn]:
    """The history as turns in which every tool call is answered directly after it.
    Results that come late (behind a system message, say) move up, missing ones are made up in
    words, those without a call become text; messages of one role are merged, the last is never
    the assistant's. Where templates refuse system messages in their place, they stay there as
    marked text of the user, since moving them would spoil prefix caches."""
    turns: list[Turn] = []
    rest: list[Turn] = []  # what came after the last assistant turn
    results: dict[str, Json] = {}

    def flush() -> None:
        calls = turns[-1].blocks if turns and turns[-1].role == "assistant" else []
        ids = [b["id"] for b in calls if b["type"] == "tool_use"]
        if ids:
            missing = {"type": "tool_result", "content": NO_RESULT}
            answered = [results.pop(i, {**missing, "tool_use_id": i}) for i in ids]
            turns.append(Turn("results", answered))
        orphans = [inner for result in results.values() for inner in loose_result(result)]
        for turn in (Turn("user", orphans), *rest):
            marked = turn.role == "system" and not system_anywhere
            add_turn(turns, Turn("user", [reminder_part(turn.blocks)]) if marked else turn)
        rest.clear()
        results.clear()

    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for index, message in enumerate(messages):
        blocks = blocks_of(message["content"])
        if message.get("clear_at") == "next_user_message" and index < last_user:
            continue
        if message["role"] == "assistant":
            if rest or results:
                flush()
            add_turn(turns, Turn("assistant", blocks))
            continue
        for block in blocks:
            if block["type"] == "tool_result" and block["tool_use_id"] not in results:
                results[block["tool_use_id"]] = block
            elif block["type"] not in UNSEEN_BLOCKS:
                loose = loose_result(block) if block["type"] == "tool_result" else [block]
                add_turn(rest, Turn(message["role"], loose))
    flush()
    if turns and turns[-1].role == "assistant" and any(map(block_text, turns[-1].blocks)):
        turns.append(Turn("user", [text_part(GO_ON)]))
    return turns


def reminder_part(blocks: Sequence[Json]) -> Json:
    """A system message as text that the model knows not to be the user's."""
    text = "\n\n".join(map(block_text, blocks))
    return text_part(f"<system-reminder>\n{text}\n</system-reminder>")


def loose_result(block: Json) -> list[Json]:
    """A tool result that answers no call as blocks of any message."""
    told = TOOL_ERROR if block.get("is_error") else ""
    words = text_part(f"[Result of tool call {block['tool_use_id']}]\n{told}".strip())
    return [words, *blocks_of(block.get("content"))]


def add_turn(turns: list[Turn], turn: Turn) -> None:
    """Append a turn; one of the same role as the last is merged into it, an empty one left out."""
    if not turn.blocks:
        return
    if turns and turns[-1].role == turn.role:
        turns[-1].blocks += turn.blocks
    else:
        turns.append(turn)


def block_text(block: Json) -> str:
    """A block in words, for upstreams that have no such block; "" for what only models read."""
    kind = block["type"]
    if kind == "text":
        return str(block["text"])
    if kind in UNSEEN_BLOCKS:
        return ""
    if kind == "tool_result":
        return "\n".join(filter(None, map(block_text, loose_result(block))))
    if kind == "document":
        return document_text(block)
    if kind == "image":
        return f"[An image was here: {source_words(block['source'])}]"
    if kind in ("tool_reference", "tool_addition", "tool_removal"):
        tool = dict_or_empty(block.get("tool"))
        name = block.get("tool_name") or tool.get("name") or json.dumps(tool.get("definition"))
        told = {"tool_removal": "no longer"}.get(kind, "not" if "definition" in tool else "now")
        return f"[The tool {name} is {told} available.]"
    if kind == "compaction":
        return str(block.get("content") or "[The summary of what was said is missing.]")
    if kind == "search_result":
        text = "\n".join(map(block_text, blocks_of(block.get("content"))))
        return f"[Search result: {block.get('title')} <{block.get('source')}>]\n{text}"
    content = {k: v for k, v in block.items() if k not in ("type", "cache_control", "id")}
    content = without_keywords(content, ["encrypted_content"], [])  # Anthropic's alone
    return f"[{kind}] {json.dumps(content, ensure_ascii=False)}"


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


def signature_of(dialect: str, owner: str, kept: Json) -> str:
    """What `owner` needs back, as a signature that the client returns: nothing is kept here."""
    return COMPACT_JSON.encode({"ogx": dialect, "by": owner, **kept})


def kept_in(block: Json, dialect: str, owner: str) -> Json:
    """What signature_of() put into a block for this dialect and owner; {} for any other block."""
    signature = str(block.get("signature") or block.get("data"))
    kept = dict_or_empty(json_or_none(signature if signature.startswith(SIGNATURE_MARK) else ""))
    return kept if (kept.get("ogx"), kept.get("by")) == (dialect, owner) else {}


def document_text(block: Json) -> str:
    """A document's text, or words that say which document could not be shown."""
    source = block["source"]
    title = str(block.get("title") or "document")
    context = f"{block['context']}\n" if block.get("context") else ""
    if source["type"] not in ("text", "content"):
        return f"{context}[The document '{title}' could not be passed on to this model: " \
               f"{source_words(source)}]"
    content = source["data"] if source["type"] == "text" else source["content"]
    text = "\n".join(map(block_text, blocks_of(content)))
    return f"<document title={json.dumps(title, ensure_ascii=False)}>\n{context}{text}\n</document>"


def source_words(source: Json) -> str:
    """What a source is: `image/png, 12 kB`, a URL, a file id."""
    if source["type"] == "base64":
        return f"{source['media_type']}, {len(source['data']) * 3 // 4000 + 1} kB"
    return str(source.get("url") or source.get("file_id") or source["type"])


# ======== Tokens =============================================================================
# Estimates, since providers count with vocabularies we don't have. Pure, but for a memory of texts:
# each turn of a conversation brings again what was said before.

ATTACHED_TOKENS = 1_600  # Anthropic's upper bound for one image; also of what can't be measured
PDF_BYTES_PER_TOKEN = 40  # a page of 60 kB is about 1,500 tokens
# Each byte's class: a for small letters and most bytes of other scripts, 0, dot, or itself, as have
# capitals, line ends, the first bytes of accented letters and of Chinese.
BYTE_CLASSES = re.sub(rb"[!-/:-@\[-`{-~]", b".", re.sub(rb"[a-z\x80-\xc1\xca-\xe0]", b"a",
    re.sub(rb"[0-9]", b"0", bytes(range(256)).replace(b"\t", b" "))))
# Tokens of OpenAI's o200k, nearly: so many for a byte, and so many more for each run of classes.
# Fitted to prose, code, JSON, listings and Claude Code's prompts: the mean of each is off by 3 %.
BYTE_TOKENS = 0.428
RUN_TOKENS = ((b"aa", -0.638), (b".a", 0.19), (b".0", 1.37), (b" 0", 2.51), (b" " * 6, -2.27),
              (b"." * 8, -3.02))
known_texts: dict[int, float] = {}  # hash of a text -> its tokens


def prompt_tokens(request: Json) -> tuple[float, int]:
    """About how many tokens a request's texts and tools are, and its images and documents. Its
    thinking is left out, which most upstreams drop."""
    blocks = [b for message in request["messages"] for b in blocks_of(message["content"])]
    said = text_tokens(request["tools"]) if request.get("tools") else 0.0
    said += sum(map(text_tokens, (system_text(request), *map(block_text, blocks))))
    return said + 4 * len(request["messages"]) + 3, sum(map(attached_tokens, blocks))


def text_tokens(value: Any) -> float:
    """About how many tokens a text is, or the JSON of a value."""
    is_text = isinstance(value, str)
    try:
        key = hash(value if is_text else marshal.dumps(value, 2))  # four times as fast as JSON
    except ValueError:  # it is nested too deeply for that
        raise RecursionError from None
    count = known_texts.get(key)
    if count is None:
        text = value if is_text else json.dumps(value, ensure_ascii=False)
        data = text.encode("utf-8", "replace").translate(BYTE_CLASSES)
        count = BYTE_TOKENS * len(data) + sum(data.count(many) * more for many, more in RUN_TOKENS)
        if len(known_texts) >= 10_000:
            known_texts.clear()
        known_texts[key] = count
    return count


def attached_tokens(block: Json) -> int:
    """About how many tokens a block's images and documents are."""
    kind, source = block["type"], block.get("source") or {}
    if kind == "tool_result":
        return sum(map(attached_tokens, blocks_of(block.get("content"))))
    if kind not in ("image", "document") or source["type"] in ("text", "content"):
        return 0
    data = source.get("data") or ""
    if kind == "document" and data:
        return len(data) * 3 // 4 // PDF_BYTES_PER_TOKEN
    return ATTACHED_TOKENS


# ======== Events =============================================================================
# Anthropic's side of a stream. Blocks never overlap: one is open, the others wait their turn, and
# one method makes every transition. Also server-sent events, both ways, as bytes. Pure.

MAX_EVENT = 8 * 1024 * 1024  # bytes of an upstream's
DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),
          "tool_use": ("input_json_delta", "partial_json")}
STARTS = {"text": {"type": "text", "text": ""},
          "thinking": {"type": "thinking", "thinking": "", "signature": ""}}
UNSIGNED = signature_of("", "", {})  # some SDKs drop thinking that has none
DELTA_FIELDS = dict(DELTAS.values())  # type of delta -> its field
DELTA_EVENT = ('event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
               '"delta":{"type":"%s","%s":%s}}\n\n')


def new_message(message_id: str, model: str, input_tokens: int) -> Json:
    """A message at its start, with every field that Anthropic's OpenAPI requires."""
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
        searched = {"web_search_requests": self.searches, "web_fetch_requests": 0}
        return {"input_tokens": self.input, "output_tokens": self.output,
                "cache_creation_input_tokens": self.cache_written,
                "cache_read_input_tokens": self.cache_read,
                "server_tool_use": searched if self.searches else None,
                "iterations": None}


@dataclass
class Block:
    """A block that is open or waits: `pending` isn't written yet, `input` is all of a call's; both
    in pieces, since to join them each time would be quadratic."""

    key: Any  # what fragments of it are recognised by
    kind: str  # text, thinking, tool_use or whole
    id: str = ""
    name: str = ""
    pending: list[str] = field(default_factory=list)
    input: list[str] = field(default_factory=list)
    content: Json | None = None  # of a block that needs no deltas
    begun: bool = False
    size: int = 0  # of the input
    judged: int = 0  # characters of it that were looked at to see whether it is whole

    def may_open(self) -> bool:
        return self.kind != "tool_use" or self.name != ""

    def is_whole(self) -> bool:
        """Whether another block may follow: a call's input is complete. To look at it anew after
        each of many pieces would be quadratic: it waits for the end of the answer then."""
        if self.kind != "tool_use":
            return True
        if self.judged > 16 * self.size + MAX_HEAD:
            return False
        self.judged += self.size
        return is_json("".join(self.input))


def is_json(text: str) -> bool:
    return json_or_none(text) is not None or text.strip() == "null"


class MessageWriter:
    """Writes one message as events; `take()` hands out those not taken yet, bytes as they are.
    Grammar: message_start; then per block start, deltas, stop, with indices from 0 and never two
    open at once; message_delta, message_stop."""

    def __init__(self, message: Json, used_ids: Iterable[str] = (), stops: Sequence[str] = (),
                 hides_thinking: bool = False) -> None:
        self._hides_thinking = hides_thinking
        self._stops = stops  # sequences that end the text, for upstreams that don't look for them
        self._tail = ""  # of the text, held while it may be the beginning of one
        self.stopped: str | None = None  # the one that was found
        self._message: Json | None = message  # until it was started
        self.input_tokens: int = message["usage"]["input_tokens"]
        self._used_ids = set(used_ids)  # of tool calls; Claude Code drops a call whose id recurs
        self.events: list[Json | bytes] = []
        self._blocks: collections.deque[Block] = collections.deque()  # open, then those that wait
        self._known: dict[Any, Block] = {}  # the same by key
        self._ended: set[Any] = set()  # keys of closed tool calls
        self._index = -1
        self.tools = 0
        self.wrote = False  # text or a call
        self.broken_input = False  # a tool call ended before its input was whole

    def take(self) -> list[Json | bytes]:
        events, self.events = self.events, []
        return events

    def goes_on(self, kind: str, escaped: str) -> bool:
        """Whether a block of that kind is open and went on by a text in JSON's quotes."""
        if not self._blocks or self._blocks[0].kind != kind:
            return False
        self.events.append((DELTA_EVENT % (self._index, *DELTAS[kind], escaped)).encode("ascii"))
        return True

    def _is_open(self, *kinds: str) -> bool:
        """Whether a block of these kinds is open; only a tool call may be first and wait."""
        return bool(self._blocks) and self._blocks[0].kind in kinds

    def start(self) -> None:
        """Write message_start, once."""
        if self._message is not None:
            self.events.append({"type": "message_start", "message": self._message})
            self._message = None

    def text(self, text: str) -> None:
        if self._stops:
            text = self._until_stop(text)
        if text:
            self._fragment("text", "text", text)

    def _until_stop(self, text: str) -> str:
        """The text up to a stop sequence, without an end that may yet become one."""
        text = "" if self.stopped else self._tail + text
        found = [(text.index(stop), stop) for stop in self._stops if stop in text]
        if found:
            at, self.stopped = min(found)
            self._tail = ""
            return text[:at]
        lengths = range(min(len(text), max(map(len, self._stops)) - 1), 0, -1)
        held = next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stops)), 0)
        self._tail = text[len(text) - held :]
        return text[: len(text) - held]

    def signature(self, signature: str) -> None:
        """Sign and end the thinking that is open, or stand for thinking that isn't shown."""
        if self._is_open("thinking"):
            self._close(signature)
        else:
            self.whole({"type": "redacted_thinking", "data": signature})

    def whole(self, content: Json) -> None:
        """A block that needs no deltas, as soon as it may stand after what came before it."""
        self._blocks.append(Block(object(), "whole", content=content))
        self._advance()

    def citation(self, citation: Json) -> None:
        """A source of the text that is open."""
        if self._is_open("text"):
            self._delta("citations_delta", "citation", citation)

    def thinking(self, text: str) -> None:
        if text and not self._hides_thinking:
            self._fragment("thinking", "thinking", text)

    def tool(self, key: Any, call_id: str, name: str, fragment: str) -> None:
        """A piece of a tool call; `key` tells calls apart, id and name may come later or never."""
        if key not in self._ended:
            self._fragment(key, "tool_use", fragment, call_id, name)

    def finish(self, stop_reason: str, stop_sequence: str | None, usage: Usage) -> None:
        """Write what waits, close, and end the message. A stop is `tool_use` whenever a call was
        written, and only then, and `max_tokens` when a call's input broke off."""
        self.start()
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
        self.events.append({"type": "message_delta", "delta": delta, "usage": usage.as_json(),
                            "context_management": None})
        self.events.append({"type": "message_stop"})

    def end_text(self) -> None:
        """Close an open text, since another one follows, or since the answer ends in an error and
        Claude Code then keeps it and goes on from there. A tool call stays open, or half of one
        would count as whole."""
        if self._tail and self._message is None:  # what failed before it began may be tried again
            self._fragment("text", "text", self._tail)
            self._tail = ""
        if self._is_open("text", "whole"):
            self._close()

    def _fragment(self, key: Any, kind: str, text: str, call_id: str = "", name: str = "") -> None:
        block = self._known.get(key)
        if block is None:
            self.wrote = self.wrote or kind != "thinking"
            block = self._known[key] = Block(key, kind)
            self._blocks.append(block)
        block.id = block.id or call_id
        block.name = block.name or name
        block.pending.append(text)
        if kind == "tool_use":
            block.input.append(text)
            block.size += len(text)
        self._advance()

    def _advance(self, ending: bool = False) -> None:
        """Write what may be written by now: a block waits for the ones before it to close, which
        calls do when their input is whole, and a call for its name."""
        while self._blocks and self._blocks[0].may_open():
            block = self._blocks[0]
            if not block.begun:
                self._begin(block)
            pending = "".join(block.pending)
            if pending:
                self._delta(*DELTAS[block.kind], pending)
            block.pending.clear()
            followed = len(self._blocks) > 1 and self._blocks[1].may_open()
            if not ending and not (followed and block.is_whole()):
                return
            self._close()
        if ending and self._blocks:
            raise OgxError(502, "the upstream sent a tool call without a name")

    def _begin(self, block: Block) -> None:
        self.start()
        block.begun = True
        self._index += 1
        content = block.content or STARTS.get(block.kind)
        if content is None:
            self.tools += 1
            content = {"type": "tool_use", "id": self._fresh_id(block.id), "name": block.name,
                       "input": {}, "caller": {"type": "direct"}}
        self.events.append({"type": "content_block_start", "index": self._index,
                            "content_block": content})

    def _delta(self, kind: str, name: str, value: Any) -> None:
        delta = {"type": kind, name: value}
        self.events.append({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _close(self, signature: str = UNSIGNED) -> None:
        block = self._blocks.popleft()
        self._known.pop(block.key, None)
        if block.kind == "thinking":
            self._delta("signature_delta", "signature", signature)
        if block.kind == "tool_use":
            self._ended.add(block.key)
            whole = "".join(block.input)
            if not whole.strip():
                self._delta(*DELTAS["tool_use"], "{}")
            elif not is_json(whole):
                self.broken_input = True
        self.events.append({"type": "content_block_stop", "index": self._index})

    def _fresh_id(self, call_id: str) -> str:
        """An id of Anthropic's alphabet that the conversation doesn't have yet."""
        call_id = re.sub(r"[^A-Za-z0-9_-]", "_", call_id)
        if not call_id or call_id in self._used_ids:
            call_id = fresh_id("toolu")
        self._used_ids.add(call_id)
        return call_id


def fresh_id(prefix: str) -> str:
    """An id as Anthropic's look; it need not be hard to guess, so no system call is made for it."""
    return f"{prefix}_{random.getrandbits(96):024x}"


def message_from_events(events: Iterable[Json]) -> Json:
    """The message that a complete stream of events amounts to."""
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
        kind = event["type"]
        if kind == "message_start":
            self._message = event["message"]
        elif kind == "content_block_start":
            self._message["content"].append(dict(event["content_block"]))
            self.size += 500
        elif kind == "content_block_delta":
            delta = event["delta"]
            name = DELTA_FIELDS.get(delta["type"], delta["type"].partition("_")[0])
            piece = delta["citation" if name == "citations" else name]
            self._pieces.setdefault((event["index"], name), []).append(piece)
            self.size += len(piece) + 50
        elif kind == "message_delta":
            self._message.update(event["delta"])
            self._message["usage"].update(event["usage"])

    def message(self) -> Json:
        content = self._message["content"]
        for (index, name), pieces in self._pieces.items():
            if name == "citations":
                content[index]["citations"] = pieces
                continue
            told = "".join(pieces)
            if name != "partial_json":
                content[index][name] = told
            elif is_json(told):
                content[index]["input"] = json_or_none(told) or {}
            else:  # half a call must not run
                words = f"[A call of {content[index]['name']} that broke off: {told}]"
                content[index] = {"type": "text", "text": words}
        return self._message


def sse_bytes(event: Json | bytes) -> bytes:
    """One event as Anthropic sends it."""
    if isinstance(event, bytes):
        return event
    if event["type"] == "content_block_delta" and event["delta"]["type"] in DELTA_FIELDS:
        # Nearly all events are these: the same bytes as below at a sixth of the time.
        kind, name = event["delta"]["type"], DELTA_FIELDS[event["delta"]["type"]]
        text = json.encoder.encode_basestring_ascii(event["delta"][name])
        return (DELTA_EVENT % (event["index"], kind, name, text)).encode("ascii")
    return f"event: {event['type']}\ndata: {COMPACT_JSON.encode(event)}\n\n".encode("ascii")


class SseReader:
    """Server-sent events from bytes cut anywhere: `feed` gives the data of each complete event.
    CR, LF and CRLF end lines; comments and other fields are ignored; several data lines are
    joined by LF (WHATWG HTML, 9.2). An event larger than `limit` bytes raises OgxError(502)."""

    def __init__(self, limit: int = MAX_EVENT) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._limit = limit
        self._size = 0
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        pieces = data[:-2].split(b"\n\n")
        if (data.count(b"\n") == 2 * len(pieces) and b"\r" not in data and data[-2:] == b"\n\n"
                and not (self._rest or self._data or self._after_cr)):
            # Nearly all blocks are whole events of one line: the same as below, five times as fast.
            events = [piece[6:] for piece in pieces if piece[:6] == b"data: "]
            if len(events) == len(pieces):
                return events
        if self._after_cr and data[:1] == b"\n":  # the second half of a CRLF that was cut
            data, self._after_cr = data[1:], False
        if not data:
            return []
        self._after_cr = data.endswith(b"\r")
        self._rest += data
        if len(self._rest) + self._size > self._limit:
            raise OgxError(502, "the upstream sent an event that is too large")
        if b"\n" not in data and b"\r" not in data:  # not to split a long line again and again
            return []
        lines = bytes(self._rest).splitlines(keepends=True)
        self._rest = bytearray(b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop())
        events = []
        for line in lines:
            line = line.rstrip(b"\r\n")
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._size += len(line)
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data, self._size = [], 0
        return events

    def end(self) -> list[bytes]:
        """The event that the end of the stream completes, if any."""
        return self.feed(b"\n\n") if self._rest or self._data else []


STOP_REASONS = (  # words in a finish_reason -> stop_reason; "": it broke off
    ("error|abort|cancel|fail|network|connect|time.?out|interrupt|resource|malformed|unexpected|"
     "incomplete|call_filter", ""),
    ("window|context|model_length", "model_context_window_exceeded"),
    ("length|max.{0,40}tokens|token_limit", "max_tokens"),
    ("filter|safety|sensitive|recitation|prohibited|block(list|ed)|spii|refus|guardrail|policy",
     "refusal"),
    ("stop|eos|end_turn|complete|done|tool|function_call", "end_turn"))


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
        reasons = (reason for stems, reason in STOP_REASONS if re.search(stems, words.lower()))
        reason = next(reasons, "end_turn" if self.writer.wrote or self._holds else "")
        if not reason:
            raise upstream_error(Refusal(502, f"the answer broke off: {words}"), self._origin, {})
        return reason

    def _error(self, data: bytes) -> OgxError:
        return upstream_error(refusal_from_body(200, data), self._origin, {})


def usage_from_openai(usage: Json, estimate: int = 0) -> Usage:
    """Anthropic's usage from OpenAI's, whose input includes what was cached."""
    details = dict_or_empty(usage.get("prompt_tokens_details") or usage.get("input_tokens_details"))
    numbers = {**usage, **details}

    def number(*names: str) -> int:
        return first_number(numbers, names) or 0

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
MAX_RULES = 200  # characters of a tool's description about keywords that its schema lost
MAX_INLINED = 30_000  # characters of definitions in a tool's schema
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # OpenAI's rule; Anthropic allows 128 characters
MEDIA_TYPES = {"image": ("image/jpeg", "image/png", "image/gif", "image/webp"),
               "document": ("application/pdf",)}
MAX_IMAGE = 5 * 1024 * 1024  # characters of base64, as at Anthropic
ANSWER_TOOL = "give_answer"  # is called with a JSON answer where no response_format is taken


def chat_request(request: Json, model: Model) -> Json:
    """The chat completion request for a checked Messages request."""
    kind = model.provider.kind
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
        **filled_in({
            "temperature": request.get("temperature"), "top_p": request.get("top_p"),
            "top_k": request.get("top_k") if kind.top_k else None,
            "stop": (request.get("stop_sequences") or [])[:4],  # the most it takes
            "prompt_cache_key": conversation_key(request) if kind.cache_key else "",
            "reasoning_effort": reasoning_effort(request, model),
            "response_format": {"type": "json_schema", "json_schema": answer_format(schema)}
            if mode == "format" else None}),
        **(streaming if request.get("stream") or 0 < kind.stream_above < most else {})}


def filled_in(values: Json) -> Json:
    """The fields that have a value; 0 and False are values."""
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
    """A tool's name as a chat upstream takes it: a hash of the whole keeps changed names apart."""
    if TOOL_NAME.fullmatch(name):
        return name
    digest = f"{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}"
    return f"{re.sub('[^a-zA-Z0-9_-]', '_', name)[:55]}_{digest}"


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
    """The system prompt and the history as messages that strict providers accept. The user's in a
    row become one or, where none may follow a tool's, are added to that."""
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
    tools = [tool for tool in request.get("tools") or () if is_client_tool(tool)]
    return tools[: kind.max_tools or None]


def tool_names(tools: Iterable[Json]) -> str:
    return ", ".join(tool.get("name") or str(tool.get("type")) for tool in tools)


def unserved_tools_note(request: Json, kind: ProviderKind, served: tuple[str, ...] = ()) -> str:
    """Words for the model about tools that are too many or run at Anthropic alone, as web search;
    types that begin with `served` run at the upstream too."""
    sent = {PLACEHOLDER, *(tool["name"] for tool in sent_tools(request, kind))}
    names = tool_names(tool for tool in request.get("tools") or ()
                       if tool.get("name") not in sent
                       and not str(tool.get("type")).startswith(served))
    return names and f"These tools are not available through this gateway: {names}. " \
                     "If one of them is needed, tell the user so plainly."


def search_notice(request: Json) -> str:
    """Words for the user where all tools run at Anthropic: Claude Code's WebSearch would look like
    one without results."""
    tools = request.get("tools") or ()
    if not tools or any(map(is_client_tool, tools)):
        return ""
    return f"[{tool_names(tools)} is not available with this model; what follows is from its own " \
           "memory.]\n\n"


def assistant_message(blocks: Sequence[Json], model: Model) -> Json:
    """An assistant turn: texts, tool calls, and the reasoning that the upstream wants back."""
    kind = model.provider.kind
    extra = dict(kind.tool_call_extra)
    calls: list[Json] = []
    details: list[Json] = []
    for block in blocks:
        if block["type"] == "tool_use":
            arguments = json.dumps(block["input"], ensure_ascii=False)
            function = {"name": upstream_name(block["name"]), "arguments": arguments}
            calls.append({"id": tool_call_id(block["id"], kind), "type": "function",
                          "function": function, **extra})
            extra = {}  # of parallel calls the first is signed
        elif kind.own_reasoning and block["type"] != "text":
            state = kept_in(block, "chat", model.served)
            extra = filled_in({"extra_content": state.get("extra_content")}) or extra
            details += as_list(state.get("reasoning_details"))
    text = paragraphs(block_text(b) for b in blocks if b["type"] != "tool_use")
    thoughts = "\n".join(b["thinking"] for b in blocks if b["type"] == "thinking")
    return {"role": "assistant", "content": text or None if calls else text,
            **filled_in({"reasoning_details": details, "tool_calls": calls}),
            **({kind.reasoning_echo: thoughts or " "} if kind.reasoning_echo else {})}


def tool_messages(results: Sequence[Json], kind: ProviderKind) -> Iterator[Json]:
    """A message per result, then a user's with their images and files, which those can't hold."""
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
    """A call's id, or in its place one that the upstream takes."""
    if not kind.tool_ids or re.fullmatch(kind.tool_ids, call_id):
        return call_id
    digest = hex_digest(call_id)
    return digest if re.fullmatch(kind.tool_ids, digest) else digest[:9]


def hex_digest(text: str) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, ascii(text)).hex


def attachment_part(block: Json, kind: ProviderKind) -> Json | None:
    """An image or a PDF as a part of a message; None for what must become text."""
    source = block.get("source") or {}
    if block["type"] == "image" and source["type"] in ("base64", "url") and kind.images:
        return {"type": "image_url", "image_url": {"url": data_url(block)}}
    if block["type"] == "document" and source["type"] == "base64" and kind.files:
        name = str(block.get("title") or "document")
        if not name.lower().endswith(".pdf"):  # OpenAI tells a file's type by its name
            name += ".pdf"
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
    """`tools`, `tool_choice` and `parallel_tool_calls`; none of them without a tool."""
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
    """A tool as a function, whose schema is an object with properties."""
    tool = plainer_tool(tool, kind)
    schema = {**tool["input_schema"], "type": "object"}
    schema["properties"] = schema.get("properties") or {}
    schema.pop("$schema", None)
    described = {"description": tool["description"]} if tool.get("description") else {}
    function = {"name": upstream_name(tool["name"]), **described, "parameters": schema}
    return {"type": "function", "function": function}


def plainer_tool(tool: Json, kind: ProviderKind) -> Json:
    """A tool with a schema that the upstream takes; its description tells the constraints that the
    schema lost, if they are short."""
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
    return {**tool, "input_schema": schema, **({"description": description} if description else {})}


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
    """All properties of some objects; one that differs may be as in any of them."""
    schemas: dict[str, list[Any]] = collections.defaultdict(list)
    for properties in objects:
        for name, schema in properties.items():
            if schemas[name][-1:] != [schema]:
                schemas[name].append(schema)
    return {name: {"anyOf": any_of} if any_of[1:] else any_of[0]
            for name, any_of in schemas.items()}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def conversation_key(request: Json) -> str:
    """At most 64 characters that tell conversations apart, for the prompt cache: the session that
    Claude Code writes as JSON into metadata.user_id, or a digest of that."""
    user_id = str((request.get("metadata") or {}).get("user_id") or "")
    session = dict_or_empty(json_or_none(user_id)).get("session_id")
    if isinstance(session, str) and 0 < len(session) <= 64 and session.isascii():
        return session
    return hex_digest(user_id) if user_id else ""


def reasoning_effort(request: Json, model: Model, default: str = "") -> str:
    """OpenAI's effort: "none" for disabled thinking, else the last effort in an `output_config`,
    else by the thinking budget, else the default; "" for a model that takes none."""
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
    """How structured output is asked for, and its schema: by response "format", by a "tool" that
    must be called, or in "words"; "" for none."""
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
    required = schema.get("required")
    start = min((at for at in map(text.find, "[{") if at >= 0), default=0)
    for part in (text.strip(), text[start : max(map(text.rfind, "]}")) + 1]):
        value: Any = json_or_none(part)
        names = as_list(required) if isinstance(value, dict) else ()
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
    properties = dict_or_empty(schema.get("properties"))
    if properties or schema.get("type") == "object":
        required = as_list(schema.get("required"))
        if schema.get("additionalProperties") is not False or any(
                name not in required for name in properties):
            return False
    return all(map(is_strict, schema.values()))


class ChatTranslator(Translator):
    _last_call: ToolCall | None = None
    _answer: ToolCall | None = None  # of ANSWER_TOOL

    def __init__(self, writer: MessageWriter, request: Json, model: Model) -> None:
        super().__init__(writer, request, model)
        self._names = ToolNames(request)
        self._stops = request.get("stop_sequences") or ()
        self._calls: dict[Any, ToolCall] = {}  # by id, and the last one of each index
        self._tags = ThinkTagParser()
        self._details: dict[Any, Json] = {}  # reasoning that goes back as it came
        self._notice = search_notice(request)
        mode, self._schema = structured_output(request, model.provider.kind)
        self._holds = mode in ("tool", "words")  # since what isn't JSON is no part of the answer
        self._held: list[str] = []
        self._text = self._held.append if self._holds else writer.text
        self._template = ChunkTemplate(bool(request.get("stream")) and not self._stops)

    def feed(self, data: bytes) -> None:
        text = self._template.text_in(data)
        if text and not self._details and self.writer.goes_on(self._template.block_type, text):
            self._chunks += 1
            return
        count = len(self.writer.events)
        super().feed(data)
        if self._template.learns and not self._details and len(self.writer.events) == count + 1:
            self._template.learn(data, self.writer.events[-1], self._tags.block_type)

    def _read(self, chunk: Json, data: bytes) -> None:
        choices = chunk.get("choices") or ()
        if is_failure(chunk) or any(choice.get("error") for choice in choices):
            raise self._error(data)
        for holder in (*choices, dict_or_empty(chunk.get("x_groq")), chunk):
            if isinstance(holder.get("usage"), dict):
                self.usage = usage_from_openai(holder["usage"])
        for choice in choices:
            self._read_choice(choice)

    def _flush(self) -> None:
        self._write(self._tags.end())
        self._sign()
        if self._holds:
            self._write_answer()

    def _write_answer(self) -> None:
        """Write only the JSON in the model's answer; OgxError(502) for a complete answer without
        any of the right shape."""
        text = self._answer.arguments if self._answer else "".join(self._held)
        answer = extracted_json(text, self._schema)
        complete = self._stop_reason == "end_turn" and not self._stop_sequence
        if complete and not answer and not self._refused and not self.writer.tools:
            words = "answered with no JSON of the shape that was asked for"
            raise OgxError(502, f"{self._origin} {words}", quote=f" but: {one_line(text)}")
        self.writer.text(answer or text)

    def _sign(self) -> None:
        if self._details:
            self._write_state({"reasoning_details": list(self._details.values())})
            self._details = {}

    def _write_state(self, state: Json) -> None:
        self.writer.signature(signature_of("chat", self._model.served, state))

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
        # vLLM and others name the sequence that stopped them beside the finish_reason.
        if choice.get("stop_reason") in self._stops:
            self._stop_sequence = choice["stop_reason"]

    def _read_details(self, details: Sequence[Json], shown: bool) -> None:
        """Take in OpenRouter's reasoning, which goes back with the pieces of an index joined."""
        for detail in details:
            self.writer.thinking("" if shown else detail.get("text") or detail.get("summary") or "")
            key = (detail.get("index", len(self._details)), detail.get("type"))
            whole = self._details.setdefault(key, {})
            for name, value in detail.items():
                if value is not None:
                    is_piece = name in ("text", "summary")
                    whole[name] = whole.get(name, "") + value if is_piece else value

    def _read_content(self, content: Any) -> None:
        """Take in text, or Mistral's list of parts, where thinking is a list of texts."""
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
        """The call that a fragment belongs to, or a new one. Servers leave out the index, the id
        or both, number every call 0, or repeat id and name with each fragment. A new id begins a
        call; without ids so does a new name, or the same when the call's arguments are whole."""
        if call_id in self._calls:
            return self._calls[call_id]
        call = self._last_call if index is None else self._calls.get(index)
        is_new = call is None or bool(call.id and call_id)
        if call and call.name and name and not call_id:
            is_new = index is None or call.name != name or is_json(call.arguments)
            is_new = is_new and not self._names.continues(call, name)
        if call is None or is_new:
            call = self._last_call = self._calls[index] = ToolCall()
        return call


class ChunkTemplate:
    """What a stream's chunks have before and after their text. One that differs in nothing else
    needn't be parsed, which would be two thirds of the work. `obfuscation`, OpenAI's noise of any
    length, may differ too."""

    PLAIN = re.compile(  # text escaped just as we would
        rb'"(?:[^"\\\x00-\x1f\x7f-\xff]|\\["\\bfnrt]|\\u(?!00[0-7])[0-9a-f]{4})+"')
    NOISE = re.compile(rb'"obfuscation": ?"[A-Za-z0-9]*"')

    block_type = ""  # of the block that the text belongs to
    _prefix = b"\0"  # with which no chunk begins
    _suffix = _quiet_suffix = b""  # the second without noise
    _misses = 0  # chunks learned from since one was recognised

    def __init__(self, learns: bool) -> None:
        self.learns = learns  # while it is of use

    def text_in(self, chunk: bytes) -> str | None:
        """The text in JSON's quotes; None for a chunk that must be parsed."""
        if not chunk.startswith(self._prefix) or len(chunk) > MAX_HEAD:
            return None
        match = self.PLAIN.match(chunk, len(self._prefix))
        if match is None:
            return None
        suffix = chunk[match.end() :]
        if suffix != self._suffix and self.NOISE.sub(b"", suffix) != self._quiet_suffix:
            return None
        self._misses = 0
        return match.group().decode("ascii")

    def learn(self, chunk: bytes, event: Json | bytes, tagged: str) -> None:
        """Learn from a chunk and its one event. `tagged` is what ThinkTagParser took the text for:
        thinking may end in any chunk."""
        delta = {} if isinstance(event, bytes) else event.get("delta") or {}
        block_type = DELTA_FIELDS.get(delta.get("type", ""), "")
        if block_type in ("text", "thinking") and tagged != "thinking":
            text = json.encoder.encode_basestring_ascii(delta[block_type]).encode("ascii")
            prefix, found, suffix = chunk.partition(text)
            if found and text not in suffix and self.PLAIN.fullmatch(text):
                self.block_type, self._prefix, self._suffix = block_type, prefix, suffix
                self._quiet_suffix = self.NOISE.sub(b"", suffix)
        self._misses += 1
        self.learns = self._misses < 10


class ThinkTagParser:
    """Tells text from the thinking that some servers leave at its beginning, between <think> and
    </think>. A partial tag is buffered."""

    TAGS = ("<think>", "<thinking>", "<thought>")

    block_type = ""  # "thinking" or "text", once it is known
    _begun = False  # the first words after a tag, or without one, came
    _end_tag = ""

    def __init__(self) -> None:
        self._buffer: list[str] = []

    def feed(self, text: str) -> list[tuple[str, str]]:
        """Pairs of a block type and words."""
        self._buffer.append(text)
        if not self._begun and not text.strip():  # it is joined once, with the words behind it
            return []
        words = "".join(self._buffer)
        self._buffer = []
        if not self.block_type:
            start = words.lstrip()
            tag = next((tag for tag in self.TAGS if start.startswith(tag)), "")
            if tag:
                self.block_type, self._end_tag = "thinking", f"</{tag[1:]}"
                return self.feed(start[len(tag) :])
            if any(tag.startswith(start) for tag in self.TAGS):
                self._buffer = [words]
                return []
            self.block_type = "text"
        elif not self._begun:  # white space after a tag is the tag's
            words = words.lstrip()
        self._begun = True
        return [("text", words)] if self.block_type == "text" else self._thinking(words)

    def _thinking(self, words: str) -> list[tuple[str, str]]:
        thought, end_tag, rest = words.partition(self._end_tag)
        if end_tag:
            self.block_type, self._begun = "text", False
            return [("thinking", thought), *self.feed(rest)]
        sizes = range(len(self._end_tag) - 1, 0, -1)
        partial = next((n for n in sizes if thought.endswith(self._end_tag[:n])), 0)
        self._buffer = [thought[len(thought) - partial :]]
        return [("thinking", thought[: len(thought) - partial])]

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
MODEL_FIELD = re.compile(rb'("model"\s*:\s*)"(?:[^"\\]|\\.)*"')
EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
# Quotes and line breaks in a model's text are escaped, so none of these can stand in one.
LAST_LINE = re.compile(rb'[\r\n](?:event: ?(?:message_stop|error)\b|'
                       rb'data: ?\{"(?:type": ?"error"|error": ?["{]|object": ?"error"))')
LAST_TYPES = (b'"type":"message_stop"', b'"type": "message_stop"')
USAGE_FIELDS = ("input_tokens", "output_tokens", "cache_read_input_tokens",
                "cache_creation_input_tokens")


def lost_natively(request: Json, kind: ProviderKind) -> set[str]:
    """What of ProviderKind.native_gaps a request has, which is translated then."""
    gaps = {*kind.native_gaps, *(["image"] if not kind.images else [])}
    if not gaps:
        return set()
    blocks = [block for m in request["messages"] for block in blocks_of(m["content"])]
    blocks += [inner for block in blocks if block["type"] == "tool_result"
               for inner in blocks_of(block.get("content"))]
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
    """The request as it came, but for what is Claude Code's and Anthropic's own business, and what
    the row says isn't taken."""
    kind, body = model.provider.kind, {**request, "model": model.upstream_id}
    body.pop("output_format", None)  # stands in output_config
    if not kind.is_anthropic:
        if isinstance(body.get("system"), list):
            body["system"] = [block for block in body["system"]
                              if not block_text(block).startswith(BILLING_HEADER)]
        if body.get("tools"):
            body["tools"] = [tool for tool in body["tools"] if tool.get("name") != PLACEHOLDER]
        body["messages"] = [m if m["role"] == "assistant" else plainer_content(m, kind)
                            for m in with_reminders(request["messages"])]
    if body.get("tools") and (kind.refused_keywords or kind.max_description):
        body["tools"] = [plainer_tool(tool, kind) if "input_schema" in tool else tool
                         for tool in body["tools"]]
    if kind.is_anthropic or kind.native_models:  # Claude itself
        body["messages"] = [without_foreign_thoughts(m) for m in body["messages"]]
    return body


def with_reminders(messages: Sequence[Json]) -> Sequence[Json]:
    """Messages with the system's as marked text of the user: most servers move those to the top,
    which spoils prefix caches."""
    if all(message["role"] != "system" for message in messages):
        return messages
    turns = turns_from_messages(messages, False)
    groups = itertools.groupby(turns, lambda turn: turn.role.replace("results", "user"))
    return [{"role": role, "content": [block for turn in group for block in turn.blocks]}
            for role, group in groups]


def plainer_content(holder: Json, kind: ProviderKind) -> Json:
    """A message or a tool result with words for images where the model sees none; a result's texts
    in a row are one, since some servers show only the first."""
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


def without_foreign_thoughts(message: Json) -> Json:
    """The message without thinking that Anthropic didn't sign, and would refuse."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [b for b in content if not is_foreign_thought(b)]}


def is_foreign_thought(block: Json) -> bool:
    signature = str(block.get("signature") or block.get("data") or SIGNATURE_MARK)
    is_thought = block["type"] in ("thinking", "redacted_thinking")
    return is_thought and signature.startswith(SIGNATURE_MARK)


def with_model(raw: bytes, request: Json, body: Json) -> bytes | None:
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


def last_event(data: bytes) -> tuple[int, bytes]:
    """Where in these events the last of a stream is, and the bytes that tell it; b"" for none."""
    if b"message_stop" not in data and b"error" not in data:  # nearly all; the rest takes longer
        return 0, b""
    match = LAST_LINE.search(b"\n" + data)
    if match:
        return match.start(), match.group()
    return 0, next((mark for mark in LAST_TYPES if mark in data), b"")


class NativeStream:
    """Passes a native stream on with the model's id that the client asked for; tells its end and
    usage. Only whole events go on, so that a ping or an error can follow any of them."""

    ended = False  # the last event came: message_stop, or an error
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
        if last_event(rest)[1]:
            return self._passed_on(rest + b"\n\n")
        self.error = self.error or rest
        return b""

    def _passed_on(self, data: bytes) -> bytes:
        if not self._named and b"message_start" in data:
            self._named = True
            match = MODEL_FIELD.search(data[:MAX_HEAD])
            if match:
                data = data[: match.end(1)] + self._model + data[match.end() :]
        self._tail = (self._tail + data[-2000:])[-2000:]
        at, mark = last_event(data)
        self.ended |= bool(mark)
        if b"error" in mark:
            self.error = (SseReader().feed(data[at:]) or [mark])[0]
            return data[:at]
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
    """The Responses request for a checked Messages request; after the lessons finished_responses()
    puts reasoning_effort in its place."""
    kind = model.provider.kind
    note = unserved_tools_note(request, kind, ("web_search",))
    items = [item for turn in turns_from_messages(request["messages"], kind.system_anywhere)
             for item in input_items(turn, model.provider)]
    for place, item in enumerate(items):
        if item.get("role") == "assistant":  # OpenAI's types want an id; unstored, any will do
            item["id"] = f"msg_{place}"
    mode, schema = structured_output(request, kind)
    text_format = {"type": "json_schema", **answer_format(schema)}
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
            "text": {"format": text_format} if mode else None})}


def finished_responses(body: Json) -> Json:
    finished, effort = {**body}, body.get("reasoning_effort")
    finished.pop("reasoning_effort", None)
    if effort:
        finished["reasoning"] = {**(body.get("reasoning") or {}), "effort": effort}
    return finished


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
    """What the model said, called, or thought and signed itself."""
    block_type = block["type"]
    use_id = str(block.get("id") or block.get("tool_use_id"))
    if block_type == "tool_use":
        yield {"type": "function_call", "call_id": tool_call_id(use_id, provider.kind),
               "name": upstream_name(block["name"]),
               "arguments": json.dumps(block["input"], ensure_ascii=False)}
    elif use_id.startswith(SEARCH_ID):
        if block_type == "server_tool_use" and provider.kind.own_reasoning:
            yield {"type": "web_search_call", "id": use_id[9:], "status": "completed",
                   "action": {"type": "search", **dict_or_empty(block.get("input"))}}
    elif block_type in ("thinking", "redacted_thinking"):
        state = kept_in(block, "responses", provider.id) if provider.kind.own_reasoning else {}
        own = {name: state.get(name) for name in ("id", "encrypted_content")}
        if all(isinstance(value, str) for value in own.values()):
            thought = block.get("thinking")
            summary = [{"type": "summary_text", "text": thought}] if thought else []
            yield {"type": "reasoning", "summary": summary, **own}
    elif block_text(block):
        content = [{"type": "output_text", "text": block_text(block), "annotations": []}]
        yield {"type": "message", "role": "assistant", "status": "completed", "content": content}


def input_part(block: Json, kind: ProviderKind) -> Json:
    """A block as a part of a message, or of a tool's output."""
    part = attachment_part(block, kind)
    if part is None:
        return {"type": "input_text", "text": block_text(block)}
    if part["type"] == "image_url":
        return {"type": "input_image", "image_url": part["image_url"]["url"], "detail": "auto"}
    return {"type": "input_file", **part["file"]}


def flat_tool_fields(request: Json, kind: ProviderKind) -> Json:
    """Tool fields with flat tools that aren't strict, and the provider's own web search."""
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
        """Take in from a complete item what its deltas didn't bring."""
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
                self.writer.signature(signature_of("responses", owner, state))
        elif item_type == "web_search_call":
            self._read_search(item)

    def _read_search(self, item: Json) -> None:
        """Show the provider's search, or a page that it opened, as Anthropic's tool does."""
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
    """The demo model's "request": the text it answers and the size of what it was sent."""
    tokens = round(sum(prompt_tokens(request)))
    text = (f"This is ogx.py's built-in demo model; I received {len(request['messages'])} "
            f"messages, {len(request.get('tools') or ())} tools, about {tokens:,} tokens. Set "
            "OPENAI_API_KEY, VLLM_URL or OLLAMA_URL and start `run` again to talk to a real "
            "model.")
    return {"model": model.upstream_id, "text": text, "prompt_tokens": tokens, "stream": True}


def demo_stream(body: Json) -> Iterator[bytes]:
    """The demo model's answer as a chat completion stream, a word at a time."""
    words = re.findall(r"\S+\s*", body["text"])
    usage = {"prompt_tokens": body["prompt_tokens"], "completion_tokens": len(words)}
    for delta, finish in [*(({"content": word}, None) for word in words), ({}, "stop")]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        yield f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n".encode()


DIALECTS = {
    "chat": Dialect(chat_request, ChatTranslator),
    "responses": Dialect(responses_request, ResponsesTranslator, finished_responses),
    "messages": Dialect(messages_request, finished=finished_messages, native=True),
    "demo": Dialect(demo_request, ChatTranslator),
}
COUNTED_FIELDS = ("model", "messages", "tools", "instructions", "input")


def request_path(dialect: str, kind: ProviderKind) -> str:
    """Where requests of a dialect go, below the provider's base URL."""
    if dialect == "messages":
        return kind.messages_path
    return kind.openai_root + ("/responses" if dialect == "responses" else "/chat/completions")


def ways_to_count(dialect: str, request: Json,
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
# What an upstream's refusal teaches. A row of REMEDIES reads the words of a refused request and
# gives lessons, each a change to one field; with the first that is of use it is sent again.
# Patterns are generic, since wordings change; each has its real texts as cases in the tests. Pure.

EFFORT_LADDER = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Other modes of thinking than off; a budget of 0 becomes half of the output limit.
THINKING = {"adaptive": {"type": "adaptive"}, "enabled": {"type": "enabled", "budget_tokens": 0}}
# What each action does to a field that the request has.
ACTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "clamp": min,
    "raise": max,
    "limit": lambda effort, most: min(effort, most, key=EFFORT_LADDER.index),
    "lift": lambda effort, least: max(effort, least, key=EFFORT_LADDER.index),
    "unschema": lambda tools, keyword: without_keywords(tools, [keyword], []),
    "unlist": lambda told, names: ",".join(n for n in told.split(",") if n not in names.split(",")),
    "retype": lambda thinking, kind: THINKING[kind]
    if thinking.get("type") in {*THINKING} - {kind} else thinking,
    "again": lambda value, _: value,
}
LIMIT_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
# Fields a request can do without. An upstream that refuses another one must be told apart.
OPTIONAL_FIELDS = ("temperature", "top_p", "top_k", "stop", "stream_options", "reasoning_effort",
                   "parallel_tool_calls", "response_format", "tool_choice", "prompt_cache_key",
                   "store", "include", "stop_sequences", "thinking", "output_config", "metadata",
                   "context_management", "max_tool_calls")
LEAST_LIMIT = r"(?:Expected a value >= ?|at least |minimum (?:of|is) )(\d+)"
UNSUPPORTED = (r"(?i)unsupported|unrecognized|unknown|unexpected|does not (support|match|know)|"
               r"not (supported|permitted|allowed|(both )?be (chosen|set|used|specified))|"
               r"extra (fields|inputs)|deprecated|invalid beta|"
               r"should be '")
ADVICE = r"(?i)(?<!n't )(?<!not )\b(?:use|did you mean)\b(?! of)(?:[^.;]|\.\w)*"
# Where a name, the #, is a field's even if it's an English word; below, where a number is a limit.
NAMED = (r"(?i)[`'\"]#|\b(?:parameter|argument|field)s?\b(?:[^.:#]{0,30}:)?\W{0,3}#|"
         "#:? (?:parameter|argument|field|extra)")
EXTRA = r"(?<![\w.])([a-z]\w*)(?:\.\w+)*\.(\w+): Extra inputs"
LISTED = (r"(?is).*\b(?:one of|(?:should|must) be|only supports?|(?:supported|allowed|valid|"
          r"expected)(?: \w+)?(?: are| is|:))\W(.+)")
BETAS = "anthropic-beta"  # a header, but for lessons a field like others
# Lengths. A refusal is about the window if it tells of CONTEXT and TOO_LONG or, in one sentence, of
# PROMPT, TOO_LONG and BOUND, but of no OTHERS.
CONTEXT = (r"(?i)(?<![a-z])context(?![\W_]{0,3}(?:deadline|cancel|manag|=))|prompt (?:is )?too l|"
           "request too large for model")  # the last is Groq's, about tokens per minute
TOO_LONG = (r"(?i)exceed|too (?:long|large|many)|(?:greater|longer|larger|more|less) than|overflow|"
            r"range of|\b(?:over|above)\b")
PROMPT = (r"(?i)(?<![a-z])(?:prompt(?!_cache)|(?:inputs?|messages?|tokens?)\b|conversation|"
          "current length)")
BOUND = r"(?i)max|limit|length|window|model|allowed|too long"
OTHERS = (r"(?i)\b(?:image|audio|video|pdf|file)(?!s? and text)|\d ?[KMG]i?B\b|byte|string|quota|"
          r"time|\b(?:tools?|name|ids?|rates?|daily|monthly|per (?:min|day|hour|sec)\w*)\b")
OUTPUT = (r"(?i)max_(?!input|prompt|model|seq)\w{0,20}tokens|maxOutputTokens|"
          r"\b(?:output|completion|maximum tokens|new tokens)\b")
COUNT = r"(?<![\w./-])(?<!\bby )(?:\d{1,3}(?:,\d{3}){1,2}|\d{2,8})(?![\w/-]|,\d)"
MOST = (r"(?i)(?:at most|than|[<>≤]|exceeds?|above|over|only|up to|max(?!\w{0,20}tokens)|limit|"
        r"range|context|window)\D{0,40}(?:\b1\D{1,20})?#(?!(?: tokens)? ?[>+])|"
        r"# (?:\w+ )?(?:the |at )?(?:max|most)")
ROOM = 256  # tokens of an answer that are worth asking for
# Words that tell how a server differs from the row it was configured under: the row is put right.
# Seen live: llama.cpp's and chat templates'. The others are from vendors' pages and issue threads.
ROW_REMEDIES: tuple[tuple[str, str, Any], ...] = (
    # OpenAI: models that take tools, or anything, only there, and those that don't
    (r"(?i)not supported (in|on|with) (the )?(/?v1/responses|Responses API)|"
     r"does not support the '/v1/responses' API", "responses", False),
    (r"use /?v1/responses|only supported in /?v1/responses|not a chat model|"
     r"does not support the '/v1/chat/completions' API", "responses", True),
    (r"(?i)only.{0,25}\bstream|(must|requires?|enable)\b.{0,20}\bstream|"
     r"\bstream(ing)?\b.{0,12}(must|required|only)|(for|with|in) non-?stream", "stream_above", 1),
    ("isn't supported on this route", "openai_root", "~/openai/v1"),  # Bedrock
    (r"encrypted content .*(verified|decrypted|invalid)|[Ii]tem with id '(rs|ws)_|"
     r"without its required following item|reasoning_details|[Cc]orrupted thought|"
     r"[Tt]hought.signature is not valid", "own_reasoning", False),
    ("(?i)must be verified to .*summar|summary.*verif", "summaries", False),
    ("roles must alternate|role 'user' after role 'tool'", "user_after_tool", False),
    ("Tool call id was .* must be a-z", "tool_ids", NINE),  # mistral-common
    (r"call(s\[\d+\]\.|_)id.{0,9}string too long", "tool_ids", FORTY),  # OpenAI
    ("reasoning_content.{0,60}(must be passed back|is missing)",
     "reasoning_echo", "reasoning_content"),  # DeepSeek, Moonshot
    (r"property '(reasoning\w*)' is unsupported", "reasoning_echo", ""),  # Groq
    ("[Ss]ystem message must be (at|the) (the )?(beginning|first)|role 'system' after role",
     "system_anywhere", False),  # Qwen, Mistral
    # OpenAI, vLLM, Groq, Ollama
    (r"(?i)(does not|doesn't|n[o']t) support images?\b(?! \w*(larger|format|url|of))|"
     r"image_url is only supported|unknown variant `image_url`|At most 0 image|mmproj|"
     r"image input is not supported|missing data required for image|found that support image",
     "images", False),
    (r"(?i)(file|document|pdf).{0,40}not supported|'?type'?: ?'?file'?.{0,60}invalid|"
     r"Invalid value: 'file'|unknown part type: file", "files", False),
    ("thought_signature", "tool_call_extra", SKIP_SIGNATURE),
    (r"not have [\w'/]+ at the top level", "root_unions", False))


@dataclass(frozen=True)
class Lesson:
    """One change to every request for a model. `field` is a key of the request, or for the action
    `row` a field of its ProviderKind; see ACTIONS."""

    action: str
    field: str
    value: Any = None
    keep: bool = True  # False: it holds for this request only
    dialect: str = ""  # whose requests it is about; empty: it is about the row
    at: float = 0.0  # when it was learned, seconds since 1970

    def __str__(self) -> str:
        value = "" if self.value is None else f" to {self.value}"
        return f"{self.action} {self.field}{value}"


def with_lessons(body: Json, lessons: Iterable[Lesson]) -> Json:
    """The request body after what was learned."""
    body = dict(body)
    for lesson in lessons:
        holder, _, name = lesson.field.partition(".")
        if name:
            lesson = replace(lesson, field=name)
            body.update({k: with_lessons(body[k], [lesson]) for k in {holder} & {*body}})
        elif lesson.action == "set":
            body[lesson.field] = lesson.value
        elif lesson.action == "row" or lesson.field not in body:
            continue
        elif lesson.action == "drop":
            del body[lesson.field]
        elif lesson.action == "rename":
            body[lesson.value] = body.pop(lesson.field)
        else:
            body[lesson.field] = ACTIONS[lesson.action](body[lesson.field], lesson.value)
    return body


def taught_model(model: Model, lessons: Iterable[Lesson]) -> Model:
    """The model with its provider's row as it was learned to be."""
    fields = {lesson.field: lesson.value for lesson in lessons if lesson.action == "row"}
    if not fields:
        return model
    kind = replace(model.provider.kind, **fields)
    return replace(model, provider=replace(model.provider, kind=kind))


def lesson_from_refusal(refusal: Refusal, body: Json, model: Model,
                        known: Sequence[Lesson] = ()) -> Lesson | None:
    """What to change so that the same request is accepted; None when nothing is known to help, or
    what would help was tried."""
    if refusal.status not in (400, 402, 404, 405, 413, 422, 500):
        return None
    words, kind = refusal.words, model.provider.kind
    tried = {lesson.field for lesson in known if lesson.action == "row"}
    if any(lesson.action == "unlist" for lesson in known):  # the next beta: name none, so all go
        refusal = replace(refusal, message=re.sub(r"[\w-]{1,60}-20\d\d-\d\d-\d\d", "", words))
    for pattern, name, value in ROW_REMEDIES:
        if name not in tried and getattr(kind, name) != value and re.search(pattern, words):
            # One conversation's reasoning can be another key's: that tells nothing about others.
            return Lesson("row", name, value, keep=name != "own_reasoning")
    no_path = refusal.status in (404, 405) and not re.search("(?i)model|item", words)
    if no_path and "input" in body:
        return Lesson("row", "responses", False)  # there is no such path
    for remedy in REMEDIES[: {402: 1, 500: 2}.get(refusal.status)]:
        for lesson in remedy(refusal, body):
            if any(k.action == lesson.action and (k.field == lesson.value or (
                    k.field == lesson.field and not k.keep)) for k in known):
                continue  # it would lead back, or was tried for this request
            actions = {lesson.action, *(k.action for k in known if k.field == lesson.field)}
            useful = lesson.action in ("again", "row") or with_lessons(body, [lesson]) != body
            if useful and not ("set" in actions and len(actions) > 1):  # that would go to and fro
                return lesson
    return plainer_tools(refusal, body, kind, "refused_keywords" not in tried)


def around(words: str, match: re.Match[str]) -> str:
    """The words around what was found, and a # in its place."""
    return f"{words[max(0, match.start() - 60) : match.start()]}#{words[match.end() :][:20]}"


def told_lengths(refusal: Refusal, asked: int) -> tuple[str, int, int]:
    """What a refusal says of lengths where `asked` tokens of output were asked for: "overflow" (the
    prompt alone is too long), "room" (it isn't, but with the output), "output" (no answer may be
    so long) or ""; then the limit and the prompt's tokens, 0 where they aren't told."""
    words = f"{refusal.words} {refusal.code.replace('_', ' ')}"
    numbers: dict[int, Any] = {}  # with whether they stand as limits
    for told in itertools.islice(re.finditer(COUNT, words), 20):
        number = int(told[0].replace(",", ""))
        numbers[number] = numbers.get(number) or re.search(MOST, around(words, told))
    large = {n for n in numbers if n != asked and (n >= 1000 or asked and n + asked in numbers)}
    about_output = re.search(rf"{OUTPUT}|\b{asked or 'output'}\b", words)
    limits = {n for n in large if numbers[n]}
    limit = (max if about_output or limits != large else min)(limits, default=0)
    others = large - {limit}
    sums = {one + other for one in others for other in (*others, asked) if other}
    prompt = max(others - sums, default=0) if limit else 0
    if is_about_window(words, prompt):
        if prompt:
            return "room" if prompt < limit else "overflow", limit, prompt
        if not about_output or not limit and "context" in refusal.code:
            return "overflow", limit if limit >= 2048 else 0, 0  # smaller ones are codes
    most = next((n for n in numbers if numbers[n] and 16 <= n < asked), 0)
    return ("output", most, 0) if about_output and most else ("", 0, 0)


def is_about_window(words: str, prompt: int) -> bool:
    """Whether a refusal is about a prompt that is too long, alone or with its answer; `prompt` is
    a number that it tells beside the limit."""
    if re.search(CONTEXT, words) and (prompt or re.search(TOO_LONG, words)):
        return True
    for part in itertools.islice(re.split(r"(?<=[.!?;])\s+|\n", words), 20):
        long = re.search(TOO_LONG, part) and re.search(BOUND, part)
        alone = long and not re.search(OUTPUT, part)  # else it may be the answer that is
        if (prompt or alone) and re.search(PROMPT, part) and not re.search(OTHERS, part):
            return True
    return False


def fitting_limit(refusal: Refusal, body: Json) -> Iterator[Lesson]:
    """`max_tokens is too large: 32000. This model supports at most 16384 completion tokens`,
    `integer below minimum value. Expected a value >= 16, but got 1 instead.`; and for a prompt
    that fits, but not with the output asked for, or an account that `can only afford 27342`, what
    is left, this once."""
    words, name = refusal.words, next((name for name in LIMIT_FIELDS if name in body), None)
    if name is None:
        return
    kind, most, prompt = told_lengths(refusal, body[name])
    left = (most - prompt) // (2 if "at least" in words else 1)  # vLLM counts no further
    kept = kind == "output" and refusal.status != 402
    if kept or kind in ("output", "room") and left >= ROOM:
        yield Lesson("clamp", name, left, kept)
    least = re.search(LEAST_LIMIT, words)
    if least and 0 < int(least[1]) <= 64 and "token" in words:
        yield Lesson("raise", name, int(least[1]))


def lower_effort(refusal: Refusal, body: Json) -> Iterator[Lesson]:
    """`Function tools with reasoning_effort are not supported for gpt-5.6-terra ... To use function
    tools, use /v1/responses or set reasoning_effort to 'none'.` `Unexpected reasoning effort high.
    Supported types are xhigh (default), medium, and low.`: the highest of those that isn't above
    what was asked, else the lowest; without a list a step down the ladder."""
    words, name = refusal.words, "reasoning_effort"
    if "Function tools with reasoning_effort" in words:
        yield Lesson("set", name, "none")
    name = name if name in body else "output_config.effort"
    asked = body.get(name) or dict_or_empty(body.get("output_config")).get("effort")
    said = re.sub(ADVICE, "", words)
    about = rf"(?i)effort(?!-2)|reasoning.{{0,80}}{asked}"  # not about a beta, effort-2025-11-24
    if asked not in EFFORT_LADDER or not re.search(about, said):
        return
    rank, listed = EFFORT_LADDER.index(asked), re.match(LISTED, words)
    if listed:
        told = [e for e in EFFORT_LADDER[1:] if e != asked and re.search(rf"\b{e}\b", listed[1])]
        if not told:  # `must be one of none or default`
            yield Lesson("drop", name)
    elif not re.search(UNSUPPORTED, words) or "Unsupported parameter" in words or rank == 2:
        return
    elif not re.search(rf"\b{asked}\b", words):  # `effort cannot be chosen for this model`
        yield Lesson("drop", name)
        return
    else:
        told = [EFFORT_LADDER[rank - 1] if rank > 2 else "low"]
    lower = [effort for effort in told if EFFORT_LADDER.index(effort) < rank]
    for effort in (lower[-1:] or told)[:1]:
        yield Lesson("limit" if lower else "lift", name, effort)


def older_fields(refusal: Refusal, body: Json) -> Iterator[Lesson]:
    """`tools.0.custom.x: Extra inputs are not permitted`; `thinking: Input tag 'adaptive' ... does
    not match`, `thinking.type.enabled is not supported. Use thinking.type.adaptive ...`;
    `Unexpected value(s) ... for the anthropic-beta header`, or `invalid beta flag`, which names
    none: then only those stay without which Claude Code's requests aren't understood."""
    said = re.sub(ADVICE, "", refusal.words)
    if not re.search(UNSUPPORTED, said):
        return
    path = re.search(EXTRA, said)
    if path:
        yield Lesson("unschema", path[1], path[2])
    asked = dict_or_empty(body.get("thinking")).get("type")
    if asked in THINKING and "thinking" in said and re.search("adaptive|enabled", said):
        yield Lesson("retype", "thinking", "enabled" if asked == "adaptive" else "adaptive")
    betas = body.get(BETAS, "").replace(" ", "").split(",")
    if re.search(r"(?i)\bbeta", said):
        named = [beta for beta in betas if beta in said]
        others = [beta for beta in betas if not beta.startswith(("claude-", "interleaved-"))]
        yield Lesson("unlist", BETAS, ",".join(named or others))


def other_tools(refusal: Refusal, body: Json) -> Iterator[Lesson]:
    """`Invalid 'tools': array too long. Expected an array with maximum length 128`; or the model
    wrote a call that the provider couldn't read, and may do better (Groq's `tool_use_failed`)."""
    most = re.search(r"tools.{0,60}(?:maximum length|at most|maximum of) (\d+)", refusal.message)
    if most and 0 < int(most[1]) < len(body.get("tools") or ()):
        yield Lesson("row", "max_tools", int(most[1]))
    if refusal.code == "tool_use_failed" or "tool call validation failed" in refusal.message:
        yield Lesson("again", "messages", keep=False)


def plainer_answer(refusal: Refusal, body: Json) -> Iterator[Lesson]:
    """A JSON answer is asked for by response_format, else by a tool that must be called, else in
    words: `Unsupported parameter: 'response_format'`, `This model does not support tool_choice`."""
    if "response_format" in body and re.search("(?i)response_?format|json_schema", refusal.words):
        yield Lesson("row", "answer_by", "tool", keep="nvalid schema" not in refusal.words)
    tools = [(tool.get("function") or {}).get("name") for tool in body.get("tools") or ()]
    if ANSWER_TOOL in tools and "tool" in refusal.words:
        yield Lesson("row", "answer_by", "words")


def dropped_field(refusal: Refusal, body: Json) -> Iterator[Lesson]:
    """`Unsupported value: 'temperature' does not support 0.2`, `property 'x' is unsupported`."""
    told = re.sub(ADVICE, "", f"{refusal.param} {refusal.words}")
    if not re.search(UNSUPPORTED, f"{told} {refusal.code}"):
        return
    told = told.replace("reasoning.effort", "reasoning_effort")
    if "think" in told:  # Ollama: `"m" does not support thinking`
        told += " reasoning_effort"
    names = (m[0] for m in re.finditer(r"\w+", told) if m[0] in (*OPTIONAL_FIELDS, *LIMIT_FIELDS)
             and (m[0] in (refusal.param, "temperature") or "_" in m[0]
                  or re.search(NAMED, around(told, m))))
    named = next(names, "")
    if named in LIMIT_FIELDS:
        if named != LIMIT_FIELDS[2]:
            yield Lesson("rename", named, LIMIT_FIELDS[named == LIMIT_FIELDS[0]])
        yield Lesson("drop", named)
    elif named:  # tool_choice changes what the answer may be, so it is left out only this once
        yield Lesson("drop", named, keep=named != "tool_choice")
    elif re.search(r"\bstrict\b", told):
        for holder in ("tools", "response_format", "text"):
            yield Lesson("unschema", holder, "strict")


# A refusal that tells of tools is about their schemas, but where it tells of these before.
OTHER_SUBJECTS = (
    r"(?s:^.*(\d tokens|messages\W{1,3}\d))|tokens|messages|prompt|\bcontent\b|image|endpoint|"
    r"quota|argument|rate.limit|api.?key|generated|(support\w{0,3}|call a) (tool|function)|"
    r"(tool|function)s?[ _.-]?(choice|call|output|result|response|use|id)(s|ing)?(?![a-z])|"
    r"(tool|function)s?\W+(is|are) not")


def plainer_tools(refusal: Refusal, body: Json, kind: ProviderKind, first: bool) -> Lesson | None:
    """The next step for refused tools: descriptions of the length told, at `first` no keywords that
    are named (`'propertyNames' is not permitted`) or whose values are (`'^\\p{L}$' is not a
    'regex'`), none that constrain, no forms that plain_schema() mends."""
    words, refused = f"{refusal.code} {refusal.words}", kind.refused_keywords
    weak = "" if refusal.status == 500 else "tool|function|"
    about = rf"(?i)(?P<other>{OTHER_SUBJECTS})|{weak}schema|grammar|regex|parameters|\$defs"
    found = re.search(about, words)
    given = map(dict_or_empty, body.get("tools") or ())
    tools = [dict_or_empty(tool.get("function")) or tool for tool in given]
    schemas = [tool.get("parameters") or tool.get("input_schema") for tool in tools]
    schemas = [schema for schema in schemas if schema]
    if not found or found["other"] or not schemas or refusal.status == 402:
        return None
    if "escription" in words and re.search("(?i)long|length|charact|exceed", words):
        most = next((int(told[0].replace(",", "")) for told in re.finditer(COUNT, words)
                     if re.search(MOST, around(words, told))), 1024)
        if any(len(tool.get("description") or "") > most for tool in tools):
            return Lesson("row", "max_description", most)
    said = {*re.findall(r"[a-z$]+", words.lower().replace("_", "").replace("regex", "pattern"))}
    quoted = {part for quote in "'`\"" for part in words.split(quote)}
    rules: list[Any] = []
    without_keywords(schemas, ["*"], rules)
    named = {name for _, name, value in rules if name.lower() in said
             or isinstance(value, str) and value in quoted}
    more = sorted(named)[:20] if first and named else ["*"] if rules else ["$ref"]
    return None if "$ref" in refused else Lesson("row", "refused_keywords", (*refused, *more))


REMEDIES = (fitting_limit, lower_effort, older_fields, other_tools, plainer_answer, dropped_field)


def overflow_error(refusal: Refusal, estimate: int, limit: int | None,
                   asked: int = 0) -> OgxError | None:
    """Anthropic's error for a prompt that is too long, in the words that make Claude Code compact
    and go on; None for a refusal of another kind. Numbers the upstream didn't tell are ours, where
    they show it. `asked` is the output that was asked for."""
    at_once = refusal.status == 429 and "Request too large" in refusal.words  # waiting won't help
    if refusal.status not in (400, 413, 422, 500) and not at_once:
        return None
    kind, most, prompt = told_lengths(refusal, asked)
    message = f"input length and `max_tokens` exceed context limit: {prompt} + {asked} > {most}"
    if kind == "overflow":
        prompt, most = prompt or estimate, most or limit or prompt or estimate
        shown = f"{prompt} tokens > {most} maximum" if prompt > most else refusal.message
        message = f"prompt is too long: {shown}"
    elif kind != "room" or most - prompt >= ROOM:
        return None
    return OgxError(400, message, refusal=refusal)


# ======== Above this line nothing does I/O ===================================================

# ======== Log ================================================================================
# What people read: the log, and lines at a terminal. Nothing else in this file writes to either:
# no control character gets there, and nobody who doesn't read holds up an answer.

LOG_FORMAT = "%(asctime)s %(message)s"
LOG_LINE = 4000  # bytes
LOG_QUEUE = 1000  # lines that wait to be written; more are counted, and lost


class LogFormatter(logging.Formatter):
    """A record as one line; only its trace, indented, brings further ones."""

    def format(self, record: logging.LogRecord) -> str:
        lines = without_controls(super().format(record)).encode("utf-8", "replace").split(b"\n")
        return "\n  ".join(line[:LOG_LINE].decode("utf-8", "ignore") for line in lines)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = " ".join(record.message.splitlines())
        return super().formatMessage(record)


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Has a thread write the lines to a file or stderr: a stopped terminal, a full pipe or a slow
    disk holds up nothing else. That a file can't be written is told once."""

    def __init__(self, path: str = "") -> None:
        stream = sys.stderr
        if path:
            stream = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        super().__init__(stream)
        self._path, self._lost = path, 0
        self._lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= LOG_QUEUE:
            self._lost += 1
            return
        if self._lost:
            record.msg = f"({self._lost} lines found no reader) {record.msg}"
            self._lost = 0
        self._lines.put(self.format(record) + self.terminator)

    def flush(self) -> None:
        """Wait for what was logged to be written, but not for long."""
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


def start_log(path: str | None, level: str) -> None:
    """Log to stderr or to a file of the user's alone; what can't be written later stops nothing."""
    if path:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        except OSError as error:
            raise OgxError(400, f"--log-file {path}: {error.strerror}") from None
    handler = LogHandler(path or "")
    handler.setFormatter(LogFormatter(LOG_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


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

LESSON_DAYS = 30
LEARNED_FROM = 250  # tokens: smaller prompts are mostly what templates add
SANE_RATIO = (0.5, 4.0)  # others are of providers that tell nothing, or leave out what was cached
MOST_LEARNED = 1000  # models about which something is kept; the first make room for others
LONGEST_ID = 512  # characters of such a model's id; longer ones are made up
STATE_SECONDS = 1.0  # between two looks at the state file


class Store:
    """JSON values by kind and key, in memory and, but for an empty path, in a file; safe for
    threads. `problem` says why the file lacks something: then sync() alone tries it again."""

    def __init__(self, path: str = "") -> None:
        self.path = os.path.abspath(path) if path else ""
        self.problem = "" if path else "there is no state file: this is lost when ogx.py stops"
        self._lock = threading.RLock()
        self._saved: dict[tuple[str, str], str] = {}  # what the file held when it was last read
        self._unsaved: dict[tuple[str, str], str] = {}  # what it is to hold; "null": no longer
        self._version = -1  # of the file: begins anywhere, and each writing adds one
        self.sync()

    def all(self, kind: str) -> dict[str, Any]:
        """All values of a kind by key, oldest first."""
        with self._lock:
            known = {**self._saved, **self._unsaved}
        values = {key: json_or_none(known[of, key]) for of, key in known if of == kind}
        return {key: value for key, value in values.items() if isinstance(value, (dict, list))}

    def put(self, kind: str, key: str, value: Any) -> str:
        """Keep a value, or none; why the file doesn't know it yet, else ""."""
        fact = kind, key.encode("utf-8", "replace").decode()  # sqlite takes no half characters
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
                self._exchange()
            except Exception as error:  # of the system, or of sqlite3, which not every Python has
                with suppress(OSError):
                    if self._set_aside(error):
                        return self.sync()
                problem = (f"can't use {self.path} as state file ({error}): what it lacks is lost "
                           "if ogx.py stops before it can")
            if problem != self.problem:
                log.warning("%s", problem or f"the state file {self.path} is used again")
            self.problem = problem

    def _exchange(self) -> None:
        if not (self._saved or self._unsaved or os.path.exists(self.path)):
            return
        import sqlite3  # only now: it costs a megabyte and start-up time

        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        with suppress(FileExistsError):  # to open and close one that exists would end its locks
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL, 0o600))
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
        held = {**self._saved, **self._unsaved}
        self._saved = {fact: value for fact, value in held.items() if value != "null"}
        self._unsaved, self._version = {}, version

    def _read(self, database: Any) -> int:
        """The file's version; what it holds is taken in where it may be new."""
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
        self._saved = {(kind, key): value for kind, key, value in rows
                       if type(key) is type(value) is str}
        return version

    def _set_aside(self, error: Exception) -> bool:
        """Whether a corrupt file was renamed; one that never was a state file is left alone."""
        if type(error).__name__ != "DatabaseError":  # locked, read-only, another program's
            return False
        with open(self.path, "rb") as file:
            ours = file.read(16) == b"SQLite format 3\0" or self._version >= 0
        if ours:
            aside = f"{self.path}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}"
            os.replace(self.path, aside)
            log.warning("%s was corrupt (%s); it is now %s", self.path, error, aside)
        return ours

    def close(self) -> None:
        if self._unsaved:
            self.sync()


def state_path(given: str | None, environ: Mapping[str, str]) -> str:
    """The state file: as given, else OGX_STATE, else in the user's directory for such things;
    empty where that isn't known."""
    base = environ.get("XDG_STATE_HOME") or environ.get("LOCALAPPDATA") or "~/.local/state"
    usual = os.path.join(base, "ogx", "state.sqlite")
    path = os.path.expanduser(given or environ.get("OGX_STATE") or usual)
    if path.startswith("~"):
        log.warning("no home directory is known, so there is no state file (see --state)")
        return ""
    return path


class Lessons:
    """Lessons by model, each kept in the store until it is LESSON_DAYS old; safe for threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.RLock()
        self.load()

    def load(self) -> None:
        """Take in what the store holds."""
        with self._lock:
            lessons: dict[str, dict[str, Lesson]] = {}  # by model, then by what each is about
            for key, entries in self._store.all("lessons").items():
                served = key.rpartition("\n")[0] or key  # earlier versions kept all at one key
                for lesson in filter(None, map(lesson_from_json, entries)):
                    lessons.setdefault(served, {})[subject_of(lesson)] = lesson
            self._lessons = lessons

    def of(self, model: Model) -> tuple[Lesson, ...]:
        lessons = self._lessons.get(model.served)
        if not lessons:
            return ()
        oldest = time.time() - LESSON_DAYS * 86400
        return tuple(lesson for lesson in lessons.values() if lesson.at > oldest)

    def add(self, model: Model, lessons: Iterable[Lesson]) -> None:
        """Keep lessons; one about the same takes the place of the older one."""
        served = model.served
        lessons = lessons if len(served) <= LONGEST_ID else ()
        for lesson in (replace(k, at=k.at or time.time()) for k in lessons if k.keep):
            subject = subject_of(lesson)
            with self._lock:
                self._lessons[served] = {**self._lessons.get(served, {}), subject: lesson}
                self._store.put("lessons", f"{served}\n{subject}", [asdict(lesson)])
                if len(self._lessons) > MOST_LEARNED:
                    self.forget(next(iter(self._lessons)))

    def forget(self, served: str) -> bool:
        """Whether there was something to forget."""
        with self._lock:
            known = self._lessons.pop(served, {})
            for key in (served, *(f"{served}\n{subject}" for subject in known)):
                self._store.put("lessons", key, None)
        return bool(known)


def subject_of(lesson: Lesson) -> str:
    """What a lesson is about."""
    value = lesson.value if lesson.action[:2] == "un" else ""
    return f"{lesson.action} {lesson.field} {lesson.dialect} {value}"


class Ratios:
    """By model, its tokens for one of our estimate: the median of the last nine answers."""

    def __init__(self) -> None:
        self._seen: dict[str, list[float]] = {}

    def estimate(self, model: Model, prompt: tuple[float, int]) -> int:
        """The tokens of a prompt as this model counts; `prompt` is what prompt_tokens() gave."""
        seen = sorted(self._seen.get(model.served, (1.0,)))
        return round(prompt[0] * seen[len(seen) // 2]) + prompt[1]

    def learn(self, model: Model, prompt: tuple[float, int], usage: Usage | None) -> None:
        """Compare an estimate with what the upstream told; images would spoil it."""
        if usage and prompt[0] >= LEARNED_FROM and not prompt[1]:
            ratio = (usage.input + usage.cache_read + usage.cache_written) / prompt[0]
            if SANE_RATIO[0] < ratio < SANE_RATIO[1] and len(model.served) <= LONGEST_ID:
                if len(self._seen) >= MOST_LEARNED:
                    self._seen = {}  # one answer relearns it
                self._seen[model.served] = [*self._seen.get(model.served, [])[-8:], ratio]


def lesson_from_json(fields: Any) -> Lesson | None:
    """A lesson as it was kept, JSON having made lists of its tuples; None for what another
    version kept."""
    try:
        value = fields["value"]
        if isinstance(value, list):
            items = (tuple(item) if isinstance(item, list) else item for item in value)
            fields = {**fields, "value": tuple(items)}
        lesson = Lesson(**fields)
        is_row = lesson.action == "row" and hasattr(ProviderKind, lesson.field)
    except (TypeError, KeyError):
        return None
    known = is_row or lesson.action in (*ACTIONS, "set", "drop", "rename")
    return lesson if known and isinstance(lesson.at, (int, float)) else None


# ======== Signing ============================================================================
# AWS takes a signature (Signature Version 4) instead of a key, made with keys from variables or a
# profile. Roles and sign-on: `credential_process = aws configure export-credentials --profile X`.

AWS_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
AWS_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
NO_CREDENTIALS = ("Unable to locate credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                  "or AWS_PROFILE; for single sign-on and roles to one with a credential_process")
PROCESS_SECONDS, PROCESS_BYTES = 30.0, 65536  # of a credential_process and what it prints
FAILURE_SECONDS = 5.0  # for which all are told that it failed
SECRET = r"(?i)(secret|token|key|password)[\w\"']{0,30}\s?[=:]\s?\S+|[\w+/=-]{32,}"


def aws_signature(method: str, url: str, headers: Mapping[str, str], body: bytes,
                  keys: Sequence[str], scope: str, now: float) -> dict[str, str]:
    """The headers that sign a request at `now`, in seconds since 1970. `headers` are signed too,
    the host among them; `keys` are AWS_KEYS' values, `scope` is "region/service". Pure."""
    import hashlib  # only now: few need them
    import hmac

    key_id, secret, token = keys
    date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    made = {"x-amz-date": date, **({"x-amz-security-token": token} if token else {})}
    signed = sorted((k.lower(), " ".join(v.split())) for k, v in {**headers, **made}.items())
    names, parts = ";".join(name for name, _ in signed), urllib.parse.urlsplit(url)
    pairs = sorted(pair.partition("=")[::2] for pair in parts.query.split("&") if pair)
    path = urllib.parse.quote(parts.path or "/", safe="/~")  # encoded already, and once more here
    canonical = "\n".join((method, path, "&".join(map("=".join, pairs)), *map(":".join, signed),
                           "", names, hashlib.sha256(body).hexdigest()))
    scope = f"{date[:8]}/{scope}/aws4_request"
    digest, key = hashlib.sha256(canonical.encode()).hexdigest(), f"AWS4{secret}".encode()
    for part in (*scope.split("/"), f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{digest}"):
        key = hmac.digest(key, part.encode(), "sha256")
    return {**made, "authorization": f"AWS4-HMAC-SHA256 Credential={key_id}/{scope}, "
                                     f"SignedHeaders={names}, Signature={key.hex()}"}


def aws_settings(environ: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """Where settings may stand, first things first: variables, then the profile in either file."""
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or ""
    yield {"region": region, **{name: environ.get(name.upper(), "") for name in AWS_KEYS}}
    profile = environ.get("AWS_PROFILE") or "default"
    files = [environ.get(name) or f"~/.aws/{AWS_FILES[name]}" for name in AWS_FILES]
    for path in filter(os.path.exists, map(os.path.expanduser, files)):
        import configparser  # only now, to start sooner

        parser = configparser.RawConfigParser(default_section="", strict=False)
        try:
            parser.read(path, encoding="utf-8")
        except (ValueError, configparser.Error) as error:  # whose words quote the file
            raise OgxError(401, f"can't read {path} ({type(error).__name__})") from None
        yield from (parser[s] for s in (profile, f"profile {profile}") if s in parser)


def with_aws_region(environ: Mapping[str, str]) -> Mapping[str, str]:
    """The environment with the region of the user's profile where no variable names one."""
    with suppress(OgxError):
        region = next((s["region"] for s in aws_settings(environ) if s.get("region")), "")
        return {**environ, "AWS_REGION": region}
    return environ


def keys_from_process(command: str, stopped: threading.Event) -> tuple[float, list[str]]:
    """What a credential_process prints, {"AccessKeyId": ..., ...}, and until when it holds."""
    import datetime
    import subprocess

    words = b""
    try:
        with subprocess.Popen(shlex.split(command), bufsize=0, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              start_new_session=True) as process:
            printed, words = printed_by(process, stopped)
        told = json.loads(printed if process.returncode == 0 else "")
        until = (told.get("Expiration") or "9000-01-01T00:00:00Z").replace("Z", "+00:00")
        end = datetime.datetime.fromisoformat(until).timestamp()
        return end, [told["AccessKeyId"], told["SecretAccessKey"], told.get("SessionToken") or ""]
    except (OSError, ValueError, LookupError, AttributeError, RecursionError) as error:
        why = re.sub(SECRET, "***", words.decode("utf-8", "replace"))
        why = one_line(why) or type(error).__name__
        raise OgxError(401, f"the credential_process of the AWS profile failed: {why}") from None


def printed_by(process: Any, stopped: threading.Event) -> tuple[bytes, bytes]:
    """What a program prints and what it says on stderr. With all that it started, it is killed
    when it takes too long or prints too much, or when `stopped` is set."""
    told, runs = {process.stdout: b"", process.stderr: b""}, True
    end = time.monotonic() + PROCESS_SECONDS
    for pipe in told:
        with suppress(AttributeError):  # Windows' older Pythons wait for what it prints
            os.set_blocking(pipe.fileno(), False)
    while runs:
        runs = process.poll() is None
        for pipe in told:
            told[pipe] = (told[pipe] + (pipe.read(PROCESS_BYTES) or b""))[:PROCESS_BYTES]
        late = time.monotonic() > end or len(told[process.stdout]) == PROCESS_BYTES
        if runs and (late or stopped.wait(0.02)):
            with suppress(OSError, AttributeError):  # Windows has no groups
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            return b"", b"it took too long, or printed too much"
    return told[process.stdout], told[process.stderr]


class Signer:
    """Signs with the user's keys of the moment, as files and processes give them."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.secrets: set[str] = set()  # all that were used
        self._clock, self._lock = clock, threading.Lock()
        self._made: dict[str, tuple[float, list[str]]] = {}  # by processes
        self._failed = (0.0, OgxError(401, ""))  # until when a failure is told
        self._stopped = threading.Event()

    def keys(self, environ: Mapping[str, str]) -> Sequence[str]:
        """Values for AWS_KEYS; OgxError(401) where there are none."""
        command = ""
        for settings in aws_settings(environ):
            keys = [settings.get(name, "").strip() for name in AWS_KEYS]
            if keys[0] and keys[1]:
                return keys
            command = command or settings.get("credential_process", "")
        if not command:
            raise OgxError(401, NO_CREDENTIALS)
        with self._lock:
            if self._made.get(command, (0.0,))[0] < self._clock() + 60:
                if time.monotonic() < self._failed[0]:
                    raise replace(self._failed[1])
                try:
                    self._made[command] = keys_from_process(command, self._stopped)
                except OgxError as error:
                    self._failed = time.monotonic() + FAILURE_SECONDS, replace(error)
                    raise
            return self._made[command][1]

    def close(self) -> None:
        """End the process that runs."""
        self._stopped.set()
        with self._lock:  # once it has ended
            pass

    def headers(self, signed: str, method: str, url: str, body: bytes | None) -> dict[str, str]:
        """The headers that sign a request now; none where the URL isn't AWS's."""
        found = re.search(signed, url)
        if not found:
            return {}
        content = {} if body is None else {"content-type": "application/json"}
        headers = {"host": urllib.parse.urlsplit(url).netloc, **content}
        keys, scope = self.keys(os.environ), f"{found.group(2)}/{found.group(1)}"
        self.secrets.update(keys[1:])
        return aws_signature(method, url, headers, body or b"", keys, scope, self._clock())


# ======== Upstream ===========================================================================
# Connections to providers. http.client makes them (TLS, proxies); requests are written and replies
# are read straight from the socket, which never waits, so that one thread can serve many and every
# piece is handed on as it comes.

POOL_SECONDS = 50.0  # an idle connection is used no longer: many servers close them after 60
POOL_SIZE = 64  # idle connections kept for one provider
PROXY_SECONDS = 60.0  # after which the system is asked again whether a proxy is before a provider
RECEIVE_SIZE = 64 * 1024
MAX_INTERIM = 500  # heads with a status of 1xx before an answer
MAX_ASKED = 32 * 1024 * 1024  # bytes of a model list and the like
HEAD_END = re.compile(rb"\n\r?\n")  # the \r before it is left to the last line
HEADER_LINE = re.compile(
    r"^([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r?$", re.M)
REQUEST_LINE = re.compile(rb"([A-Z]+) ([\x21-\x7e]+) HTTP/(1\.[01])\r?")
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])\b")
LENGTH = re.compile("([0-9]{1,18})(?: *,|$)")  # of a body; some servers send it twice
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
Headers = Mapping[str, str]  # by lower-case name
BLOCKING: Literal[False] = False  # is yielded before a step that may block or takes long
Piece = Union[bytes, Literal[False], None]  # of an answer; None: nothing is there yet; or BLOCKING
Pieces = Generator[Piece, None, None]


def headers_from_bytes(lines: bytes) -> dict[str, str]:
    """Header fields by lower-case name; fields that come twice are joined by a comma.
    Raises OgxError(400) for what smuggles: continued lines, control characters, bad names."""
    found = HEADER_LINE.findall(lines.decode("latin-1"))
    if len(found) != lines.count(b"\n") + bool(lines):
        raise OgxError(400, "malformed header line")
    headers: dict[str, list[str]] = {}
    for name, value in found:
        headers.setdefault(name.lower(), []).append(value.strip(" \t"))
    return {name: ", ".join(values) for name, values in headers.items()}


WHOLE_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")  # its size, that is


class BodyReader:
    """The payload of an HTTP message from raw bytes cut anywhere: chunked, of known length or up
    to the end; `rest` is what came after it."""

    def __init__(self, status: int, headers: Headers) -> None:
        length = LENGTH.match(headers.get("content-length", ""))
        self._chunked = headers.get("transfer-encoding", "").lower().endswith("chunked")
        self._sized = bool(length) and not self._chunked
        # Bytes that are left of a chunk or of the body.
        self._left = int(length[1]) if length and self._sized else 0
        self._state = "size"  # what comes next of a chunked body
        self._buffer = self.rest = b""
        self._unpacker = None
        if headers.get("content-encoding", "").lower() in ("gzip", "deflate"):
            self._unpacker = zlib.decompressobj(47)  # zlib or gzip, told by the data itself
        self.done = status in (204, 304) or (self._sized and not self._left)
        self.reusable = headers.get("connection", "").lower() != "close"

    def feed(self, data: bytes) -> bytes:
        if self._chunked:
            data = self._payload(data)
        elif self._sized:
            data, self.rest = data[: self._left], data[self._left :]
            self._left -= len(data)
            self.done = not self._left
        if self._unpacker:
            data = self._unpacker.decompress(data, 128 * RECEIVE_SIZE)
            if self._unpacker.unconsumed_tail:
                raise OgxError(400, "packed data that unpacks to too much")
        return data

    def _payload(self, data: bytes) -> bytes:
        # An index moves over the buffer: slicing it for every chunk would be quadratic.
        buffer, at = self._buffer + data, 0
        payload: list[bytes] = []
        while not self.done and at < len(buffer):
            # Nearly all chunks are there as a whole: the same as below, three times as fast.
            head = WHOLE_CHUNK.match(buffer, at) if self._state == "size" else None
            if head:
                start, end = head.end(), head.end() + int(head[1], 16)
                if start < end < len(buffer) and buffer.startswith(b"\r\n", end):
                    payload.append(buffer[start:end])
                    at = end + 2
                    continue
            if self._state == "data":
                piece = buffer[at : at + self._left]
                payload.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._state = "end"
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
        if self._state == "end":  # of a chunk
            if line:
                raise OgxError(400, "malformed chunked body: a chunk is longer than it said")
            self._state = "size"
        elif self._state == "trailer":
            self.done = not line
            self._left += len(line) + 1
            if self._left > MAX_HEAD:
                raise OgxError(400, "malformed chunked body: too many trailers")
        else:
            digits = line.split(b";")[0].strip()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", digits):
                raise OgxError(400, "malformed chunked body: a chunk size isn't hexadecimal")
            self._left = int(digits, 16)
            self._state = "data" if self._left else "trailer"

    def ended_by(self, data: bytes | None) -> bool:
        """Whether its last bytes, None for none, end the body and nothing else: the end of a
        chunked one often comes a moment after the last event."""
        if self.done or not data or not self._chunked:
            return self.done and data is None
        return not self._payload(data) and self.done and not self.rest

    def end(self) -> None:
        """The connection ended: fine only for a body that has no other end."""
        if not self.done and (self._chunked or self._left):
            raise OgxError(502, "the upstream closed the connection in the middle of its answer")
        self.done, self.reusable = True, False


def received(sock: socket.socket, size: int = RECEIVE_SIZE) -> bytes | None:
    """What a connection holds, b"" at its end; None where it holds nothing yet, or with TLS half
    a record. All connections are non-blocking: with a timeout, Python asks the system twice."""
    try:
        return sock.recv(size)
    except WOULD_BLOCK:
        return None


def wait_ready(sock: socket.socket, seconds: float, events: int) -> bool:
    """Whether a socket can be read or written, as `events` ask, within so many seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, events)
        return bool(selector.select(max(0.0, seconds)))


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


class Upstream:
    """A pool of connections, by where they lead. Safe for threads."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self.instance = uuid.uuid4().hex  # goes with every request, to recognise our own
        self._lock = threading.Lock()
        self._idle: dict[str, list[tuple[float, socket.socket, BodyReader]]] = {}
        self._tls: dict[tuple[bool, str], ssl.SSLContext] = {}
        self.signer = Signer()
        self._made: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._proxies: dict[str, tuple[float, urllib.parse.SplitResult | None]] = {}
        self.closed = False

    def secrets(self, provider: Provider) -> list[str]:
        """What the provider knows and may quote, and no one else may see."""
        known = (provider.api_key, *provider.secrets, *self.signer.secrets)
        return [secret for secret in known if len(secret) >= MIN_SECRET]

    def send(self, provider: Provider, method: str, path: str, body: bytes | None = None,
             headers: Headers | None = None, timeout: float | None = None) -> Reply:
        """Send a request to one of the provider's paths, as far as goes without waiting; the reply
        is still to be read."""
        if self.closed:
            raise stopping_error()
        if provider.kind is DEMO_KIND:
            return DemoReply(json.loads(body or b"{}"))
        own = {"x-ogx-instance": self.instance, **(headers or {})}
        if provider.kind.signed and not provider.api_key:
            own.update(self.signer.headers(provider.kind.signed, method, provider.url(path), body))
        proxy = self.proxy(provider) if provider.base_url.startswith("http:") else None
        data = request_bytes(provider, method, path, body, own, proxy)
        return Reply(self, provider, data, timeout or self.limits.connect_timeout)

    def proxy(self, provider: Provider) -> urllib.parse.SplitResult | None:
        """The proxy before a provider. The system is asked once a minute: that takes as long as a
        third of a request, and on a Mac waits for DNS."""
        until, proxy = self._proxies.get(provider.connection, (0.0, None))
        if until < time.monotonic():
            scheme, host, _, _ = address_of(provider.base_url)
            proxy = proxy_of(scheme, host)
            until = math.inf if is_loopback(host) else time.monotonic() + PROXY_SECONDS
            self._proxies[provider.connection] = until, proxy
        return proxy

    def sends_at_once(self, provider: Provider) -> bool:
        """Whether send() needs no file, no program and no system for what goes into the request."""
        if provider.kind.signed and not provider.api_key:
            return False
        known = self._proxies.get(provider.connection, (0.0, None))[0] > time.monotonic()
        return known or not provider.base_url.startswith("http:") or provider.kind is DEMO_KIND

    def ask(self, provider: Provider, path: str, timeout: float, body: bytes | None = None,
            headers: Headers | None = None) -> tuple[Reply, bytes]:
        """The reply to a GET, or to a POST where there is a body, and what it holds; OgxError
        when that takes longer than `timeout` seconds, for which this waits."""
        reply = self.send(provider, "POST" if body else "GET", path, body, headers, timeout)
        try:
            steps = reply.whole(timeout, MAX_ASKED)
            while True:
                if next(steps) is None:
                    reply.wait()
        except StopIteration as end:
            answer, complete = end.value
        finally:
            reply.release()
        if complete:
            return reply, answer
        raise OgxError(504, f"no complete answer from {provider.base_url} within {timeout:g} s")

    def json(self, provider: Provider, path: str, timeout: float) -> Any:
        """The JSON that a GET answers with status 200; OgxError otherwise."""
        reply, body = self.ask(provider, path, timeout)
        if reply.status != 200:
            refusal = refusal_from_body(reply.status, body)
            origin = f"{provider.url(path)}, HTTP {reply.status}"
            raise upstream_error(refusal, origin, reply.headers)
        told = json_or_none(body)
        if told is None:
            words = f"expected JSON from {provider.url(path)}, got {cut(beginning(body), 120)}"
            raise OgxError(502, words)
        return told

    def idle_connection(self, provider: Provider) -> socket.socket | None:
        """A connection to the provider that was used before and is still good."""
        while True:
            with self._lock:
                idle = self._idle.get(provider.connection)
                if not idle:
                    return None
                since, sock, body = idle.pop()
            with suppress(OSError, OgxError):
                # One that holds anything else was closed by the other side, or is out of step.
                if time.monotonic() - since < POOL_SECONDS and body.ended_by(received(sock)):
                    return sock
            sock.close()

    def give_back(self, provider: Provider, sock: socket.socket, body: BodyReader) -> None:
        with self._lock:
            idle, now = self._idle.setdefault(provider.connection, []), time.monotonic()
            while idle and now - idle[0][0] > POOL_SECONDS:
                idle.pop(0)[1].close()
            if len(idle) < POOL_SIZE:
                idle.append((now, sock, body))
                return
        sock.close()

    def close(self) -> None:
        """Close what is idle, and end what runs."""
        self.closed = True
        with self._lock:
            for idle in self._idle.values():
                for _, sock, _ in idle:
                    sock.close()
            self._idle.clear()
            for sock in self._made:
                with suppress(OSError):  # of TCP, not of TLS: its state is another thread's
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def new_connection(self, provider: Provider, timeout: float) -> socket.socket:
        """A new connection, for which this waits; OgxError 502 or 504, told for the user, when the
        provider can't be reached."""
        parts = urllib.parse.urlsplit(provider.base_url)
        host, secure, proxy = parts.hostname or "", parts.scheme == "https", None
        try:
            proxy = self.proxy(provider)
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
            self._proxies.pop(provider.connection, None)  # its proxy may be another one by now
            raise unreachable(provider, error, proxy) from None
        sock: socket.socket = connection.sock
        sock.setblocking(False)
        with self._lock:
            self._made.add(sock)
        if self.closed:  # meanwhile, and this one was not among those that were ended
            sock.close()
            raise stopping_error()
        return sock

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


def proxy_headers(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    """The proxy's credentials, from its URL."""
    return {"Proxy-Authorization": basic_auth(proxy)} if proxy.username else {}


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
    words = next((words for kind, words in UNREACHABLE.items() if isinstance(error, kind)), "{0}")
    why = words.format(error) or type(error).__name__
    status = 504 if isinstance(error, socket.timeout) else 502
    where = f"{provider.id} at {provider.base_url}"
    if proxy:
        scheme = provider.base_url.partition(":")[0].upper()
        where += f" through {scheme}_PROXY, {proxy.netloc.rpartition('@')[2]}"
    return OgxError(status, f"can't reach {where}: {why}")


@functools.lru_cache(maxsize=256)
def address_of(url: str) -> tuple[str, str, str, str]:
    """A URL's scheme, host, host with port, and what a request to it asks for."""
    parts = urllib.parse.urlsplit(url)
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    return parts.scheme, parts.hostname or "", parts.netloc, target


def request_bytes(provider: Provider, method: str, path: str, body: bytes | None,
                  extra: Mapping[str, str],
                  proxy: urllib.parse.SplitResult | None) -> bytes:
    """A whole HTTP/1.1 request for the provider, or for the proxy that reads it."""
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


class Reply:
    """An upstream's answer while it comes in; headers by lower-case name. Nothing here waits but
    connect(), which is due where `socket` is None: at first, where no connection was left of
    requests before, and when the one that was left turns out to be dead. One that is `complete`
    has nothing to say any more."""

    def __init__(self, upstream: Upstream, provider: Provider, request: bytes,
                 timeout: float) -> None:
        self.status = 0
        self.headers: Headers = {}
        self.complete = False
        self._upstream, self._provider, self._limits = upstream, provider, upstream.limits
        self._request, self._timeout = request, timeout
        self._buffer = b""
        self._body: BodyReader | None = None
        self._unsent, self._takes = memoryview(request), True  # the upstream, as far as is known
        self._interim = 0  # heads with a status of 1xx
        self._emptied = False  # its socket held no more, and need not be asked before it is ready
        self._heard_at = time.monotonic()  # or when it took some of the request
        self._deadline = math.inf
        self.socket = upstream.idle_connection(provider)
        self._reused = self.socket is not None
        if self._reused:
            self._send()

    def connect(self) -> None:
        """Make a connection and send as much as goes; OgxError 502 or 504."""
        self.socket = self._upstream.new_connection(self._provider, self._timeout)
        self._unsent, self._heard_at = memoryview(self._request), time.monotonic()
        self._takes = True
        self._send()

    def wait(self) -> None:
        """Connect where that is due, else wait for more to read or to send, and not too long."""
        if self.socket is None:
            self.connect()
        else:
            wait_ready(self.socket, self.until - time.monotonic(), self.events)

    def more(self) -> Pieces:
        """The same without waiting: in steps."""
        yield None if self.socket else BLOCKING
        if self.socket is None:
            self.connect()

    @property
    def events(self) -> int:
        """What the socket is waited for: bytes and, while some are unsent, room for them."""
        sends = self._unsent and self._takes
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if sends else 0)

    @property
    def until(self) -> float:
        """When the upstream's silence will have been too long, or what whole() may take."""
        waits = self._body is None and not self._unsent
        limits = self._limits
        silence = limits.first_byte_timeout if waits else limits.idle_timeout
        return min(self._heard_at + silence, self._deadline)

    def _send(self) -> None:
        """Send what the upstream takes now, though it may have begun to answer. An error is no
        reason to stop reading: it may have said before that the body is too large."""
        try:
            while self._unsent and self.socket:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
                self._heard_at = time.monotonic()
        except WOULD_BLOCK:
            pass
        except OSError:
            self._takes = False

    def head(self) -> bool:
        """Go on to the end of status and headers; whether they are all there."""
        while self._body is None and self.socket:
            data = self._receive()
            if data is None:
                return False
            if not data:
                self._lose()
            self._buffer += data
            while self._body is None and self._parse_head():
                self._interim += 1
                if self._interim > MAX_INTERIM:
                    raise OgxError(502, f"{self._provider.id} sent {MAX_INTERIM} heads, no answer")
        return self._body is not None

    def _lose(self) -> None:
        """The connection ended before an answer: fine only for one that may have been dead."""
        at_once = time.monotonic() - self._heard_at < 1.0
        if not self._reused or self._buffer or not at_once:
            raise self._broken(None)
        self.release()
        self._reused = False

    def _parse_head(self) -> bool:
        """Take a complete head off the buffer; whether there was one. 1xx heads are skipped."""
        end = HEAD_END.search(self._buffer)
        if end is None:
            if len(self._buffer) > MAX_HEAD:
                raise OgxError(502, f"{self._provider.id} sent headers that are too large")
            return False
        first, _, lines = self._buffer[: end.start()].partition(b"\n")
        status = STATUS_LINE.match(first)
        if not status:
            raise OgxError(502, f"{self._provider.id} at {self._provider.base_url} doesn't answer "
                                "in HTTP")
        self._buffer = self._buffer[end.end():]
        if status.group(1).startswith(b"1"):
            return True
        self.status = int(status.group(1))
        try:
            self.headers = headers_from_bytes(lines)
        except OgxError:
            raise OgxError(502, f"{self._provider.id} sent malformed headers") from None
        self._body, self._request = BodyReader(self.status, self.headers), b""
        if first.startswith(b"HTTP/1.0"):
            self._body.reusable = False
        return True

    def read(self) -> bytes | None:
        """The next piece of the body, b"" at its end, None where there is none yet."""
        body = self._body
        assert body is not None, "head() comes before read()"
        for _ in range(100):  # what brings nothing, such as empty lines, must not hold up others
            if body.done:
                return b""
            data, self._buffer = self._buffer, b""
            raw = data or self._receive()
            if raw is None:
                return None
            try:
                if not raw:
                    body.end()
                    return b""
                payload = body.feed(raw)
            except zlib.error:
                raise OgxError(502, f"{self._provider.id} sent broken gzip data") from None
            except OgxError as error:
                raise OgxError(502, f"{error.message} ({self._provider.id})") from None
            if payload:
                return payload
        return None

    def drained(self) -> bool:
        """Whether the body goes on and nothing of it is there yet, as read() would tell by None."""
        emptied, self._emptied = self._emptied, False
        return emptied and self._body is not None and not self._body.done

    def whole(self, seconds: float, size: int) -> Generator[Piece, None, tuple[bytes, bool]]:
        """The body as far as it comes in time and holds `size` bytes; whether that is all."""
        self._deadline, answer = time.monotonic() + seconds, bytearray()
        while len(answer) < size and time.monotonic() < self._deadline:
            piece = self.read() if self.head() else None
            if piece == b"":
                return bytes(answer), True
            if piece is None:
                yield from self.more()
            else:
                answer += piece
                yield b""
        return bytes(answer), False

    def _receive(self) -> bytes | None:
        """Bytes as they come, b"" at the end, None where there are none yet; OgxError(504) after
        too long a silence."""
        assert self.socket is not None
        if self._upstream.closed:
            raise stopping_error()
        if self._unsent and self._takes:
            self._send()
        if self._emptied:
            self._emptied = False
            return None
        try:
            data = received(self.socket)
        except OSError as error:
            if self._reused and self._body is None and not self._buffer:
                return b""
            raise self._broken(error) from None
        if data:
            self._heard_at = time.monotonic()
            # TLS may keep some back.
            self._emptied = len(data) < RECEIVE_SIZE and type(self.socket) is socket.socket
        elif data is None and self.until <= time.monotonic() < self._deadline:
            did = f"sent nothing for {time.monotonic() - self._heard_at:.3g} s"
            did = "stopped reading the request" if self._unsent else did
            raise OgxError(504, f"{self._provider.id} {did}")
        return data

    def _broken(self, error: OSError | None) -> OgxError:
        why = (error and error.strerror) or "it closed the connection"
        return OgxError(502, f"lost the connection to {self._provider.id} at "
                             f"{self._provider.base_url}: {why}")

    def release(self) -> None:
        """Done with it: keep the connection where it is clean, else close it."""
        body, surplus = self._body, bool(self._buffer or self._unsent)
        ended = body and body.reusable and (self.complete or body.done)
        sock, self.socket = self.socket, None
        if sock and body and ended and not (surplus or body.rest):
            self._upstream.give_back(self._provider, sock, body)
        elif sock:
            sock.close()


class DemoReply(Reply):
    def __init__(self, body: Json) -> None:
        self.status, self.headers = 200, {"content-type": "text/event-stream"}
        self.socket, self._pieces = None, demo_stream(body)

    def head(self) -> bool:
        return True

    def read(self) -> bytes | None:
        return next(self._pieces, b"")

    def drained(self) -> bool:
        return False

    def release(self) -> None:
        pass


# ======== Gateway ============================================================================
# One method per endpoint. messages() is the one way through: resolve the model, translate, send,
# learn from a refusal and send again, translate what comes back. Clients' keys stop here.

MAX_REQUESTS = 5  # to one upstream for one request of a client: remedies and retries together
BACKOFF = 0.3  # seconds before the first retry, doubled for each further one
REST = 30.0  # seconds for which a failed target of a chain is tried last
KEPT = 64  # such targets
PASSING = (408, 429, 500, 502, 503, 504, 529)  # statuses of failures that another try may not meet
TICK = 10.0  # seconds of silence after which the client gets a sign of life
LIST_TIMEOUT = 5.0  # for a provider's model list
MAX_ANSWER = 64 * 1024 * 1024  # bytes of an answer that isn't streamed
ERROR_BODY = (10.0, 1024 * 1024)  # seconds and bytes that an upstream has for its words
MAX_PAGES = 20  # of a model list
LONG = 256 * 1024  # bytes of a request that takes so long to translate that it gets a thread
MIN_CONTEXT = 32_000  # tokens; Claude Code's own prompt and tools take 15,000 of them
REFRESH = 300.0  # seconds between model lists; a 20th for local servers and after a problem
Batches = Generator[Union[list[Any], Piece], None, None]  # of events, or bytes of some, or likewise


@dataclass
class Exchange:
    """A client's request on its way through, and what the log tells about it."""

    request_id: str
    request: Json = field(default_factory=dict)
    raw: bytes = b""  # the request as the client wrote it
    headers: Headers = field(default_factory=dict)  # for upstreams that speak Messages
    sent: Headers = field(default_factory=dict)  # of them, to the present one
    asked: str = ""
    answered: bool = False  # a part of the answer is with the client: there is no second try
    served: str = ""
    dialect: str = ""
    retries: int = 0  # of the present model
    waited: float = 0.0  # seconds between them
    session: str = ""
    started: float = field(default_factory=time.monotonic)
    first_event: float | None = None
    reply: Reply | None = None  # that is waited for
    begun: bool = False  # the present model's reply began with status 200
    pause: float = math.inf  # when to go on, whatever has come by then
    drained: bool = False  # after this piece there is nothing yet, as None would tell
    usage: Usage | None = None
    dropped: str = ""  # names of what the upstream has no word for
    error: str = ""

    @property
    def stream(self) -> bool:
        return bool(self.request.get("stream"))

    def note_answer(self) -> None:
        """The answer begins; the request, a megabyte with all its objects, isn't needed again."""
        self.answered, self.raw = True, b""
        self.request = {name: self.request.get(name) for name in ("model", "stream")}


class Gateway:
    """The service behind the server. `tick` is the silence before a sign of life, in seconds. What
    answers /v1/messages never waits but after BLOCKING; other methods may."""

    def __init__(self, config: Config, upstream: Upstream | None = None, tick: float = TICK,
                 store: Store | None = None) -> None:
        self.config = config
        self.store = store or Store()
        self.registry = Registry(config)
        self.upstream = upstream or Upstream(config.limits)
        self.lessons = Lessons(self.store)
        self.ratios = Ratios()
        self.backoff = BACKOFF
        self._resting: dict[str, float] = {}  # model that failed -> until when it is tried last
        self.tick = tick
        self.discovered = threading.Event()
        self._stopped = threading.Event()
        self._loading = threading.Lock()
        self._load()

    # -- messages

    def messages(self, exchange: Exchange) -> Pieces:
        """The answer's bytes as they come: server-sent events, or one JSON object where no stream
        was asked for. None where nothing is there yet: exchange.reply and .pause tell until when.
        Raises OgxError: before the first bytes it can still become an HTTP status. Closing the
        iterator closes the upstream's connection."""
        exchange.asked = one_line(exchange.request["model"])
        if not self.discovered.is_set():
            yield BLOCKING
        chain = self._chain(exchange.request["model"])
        for place, model in enumerate(chain, 1):
            try:
                yield from self._tried(model, exchange)
                return
            except OgxError as error:
                if len(chain) > 1 and is_passing(error):
                    kept = dict([*self._resting.items()][1 - KEPT :])
                    self._resting = {**kept, model.served: time.monotonic() + REST}
                if exchange.answered or place == len(chain) or not is_passing(error):
                    raise
                log.warning("%s: %s failed: %s; trying %s", exchange.request_id, model.served,
                            one_line(error.message), chain[place].served)

    def _chain(self, model_id: str) -> list[Model]:
        """The models to try, those that failed lately at the end; while the first lists are still
        on their way, wait for them."""
        try:
            chain = self.registry.chain(model_id)
        except OgxError:
            self.discovered.wait(LIST_TIMEOUT)
            chain = self.registry.chain(model_id)
        if len(chain) == 1:
            return chain
        now = time.monotonic()
        return sorted(chain, key=lambda model: self._resting.get(model.served, 0.0) > now)

    def _tried(self, model: Model, exchange: Exchange) -> Pieces:
        """One model's answer, its refusals remedied and its failures retried."""
        exchange.served, exchange.begun, exchange.retries = model.served, False, 0
        exchange.waited, lessons = 0.0, list(self.lessons.of(model))
        known = len(lessons)
        failed, refused = None, None  # what the last lesson was learned from, and which request
        for attempt in range(1, MAX_REQUESTS + 1):
            taught = taught_model(model, lessons)
            plainer = taught.provider.kind.refused_keywords  # of schemas, which takes long
            if len(exchange.raw) > (LONG // 4 if plainer else LONG) or not self.discovered.is_set():
                yield BLOCKING
            name = exchange.dialect = self._dialect_of(taught, exchange.request)
            body, data = self._request(taught, name, exchange, lessons)
            if len(exchange.raw) > LONG:
                yield BLOCKING  # before it is sent: the client may have left
            made: Any = (request_path(name, taught.provider.kind), exchange.sent, data)
            if failed and made == refused and lessons[-1].action != "again":  # it changes nothing
                lessons[-1] = replace(lessons[-1], keep=False)
                if self._learned(failed, body, taught, exchange, lessons):
                    continue
                raise told_error(failed, exchange, model, body)
            failed, refused = None, None
            try:
                for piece in self._answer(taught, name, data, exchange):
                    if piece and not exchange.answered:  # what was changed has helped
                        body, data, made = {}, b"", None
                        exchange.note_answer()
                        if lessons[known:]:
                            yield BLOCKING  # a disk
                            self.lessons.add(model, lessons[known:])
                    yield piece
                return
            except OgxError as error:
                if len(exchange.raw) > LONG:
                    yield BLOCKING
                error.without(self.upstream.secrets(model.provider))
                last = exchange.answered or attempt == MAX_REQUESTS
                if not last and self._learned(error, body, taught, exchange, lessons):
                    failed, refused = replace(error), made
                    continue
                error = error if exchange.answered else told_error(error, exchange, model, body)
                pause = None if last else self._pause(error, exchange)
                if pause is None:
                    raise error from None
                yield from self._paused(pause, error, exchange)

    def _request(self, model: Model, name: str, exchange: Exchange,
                 lessons: Sequence[Lesson]) -> tuple[Json, bytes]:
        """The request in the dialect's words, for remedies to look at, and its bytes."""
        dialect = DIALECTS[name]
        if not model.provider.kind.is_anthropic:
            refuse_untranslatable(exchange.request, dialect.native)
        own = [lesson for lesson in lessons if lesson.dialect in ("", name)]
        body = with_lessons(dialect.request(exchange.request, model), own)
        sent = dialect.finished(dict(body))
        if not dialect.native:
            told = log.isEnabledFor(logging.DEBUG)
            exchange.dropped = dropped_names(exchange.request, sent, told)
        data = with_model(exchange.raw, exchange.request, sent) if dialect.native else None
        headers = with_lessons({**exchange.headers}, own) if dialect.native else {}
        exchange.sent = {name: value for name, value in headers.items() if value}
        return {**body, **exchange.sent}, without_halves(data or json_bytes(sent))

    def _learned(self, error: OgxError, body: Json, model: Model, exchange: Exchange,
                 lessons: list[Lesson]) -> bool:
        """Whether a refusal taught something that makes another request worthwhile."""
        refusal, provider = error.refusal, model.provider
        if refusal is None:
            return False
        if exchange.dialect == "messages" and refusal.status in (404, 405) and (
            "chat" in provider.kind.dialects and provider.dialect == "auto"
            and not provider.kind.native_models and "model" not in refusal.message.lower()
        ):  # the server was changed, or another one answered the probe
            self.registry.native[provider.id] = False
            log.info("%s: %s has no Messages API; translating", exchange.request_id, provider.id)
            return True
        lesson = lesson_from_refusal(refusal, body, model, lessons)
        if lesson is None:
            return False
        about = "" if lesson.action == "row" else exchange.dialect
        lessons.append(replace(lesson, dialect=about, at=time.time()))
        log.info("%s: %s refused: %s; sent again after: %s", exchange.request_id, model.served,
                 one_line(error.message), lesson)
        return True

    def _pause(self, error: OgxError, exchange: Exchange) -> float | None:
        """Seconds before a failed request is sent again; None when it is not. What was begun to
        be answered is never asked for twice, unless the upstream said itself that it failed."""
        if (exchange.begun and error.refusal is None) or self._stopped.is_set():
            return None
        pause = pause_before(error, exchange.retries, self.backoff)
        if pause is None or exchange.retries == self.config.retries or (
            exchange.waited + pause > self.config.retry_seconds
        ):
            return None
        exchange.retries, exchange.waited = exchange.retries + 1, exchange.waited + pause
        return pause

    def _paused(self, seconds: float, error: OgxError, exchange: Exchange) -> Pieces:
        log.info("%s: %s failed: %s; trying again in %.1f s", exchange.request_id,
                 exchange.served, one_line(error.message), seconds)
        exchange.pause = time.monotonic() + seconds
        while time.monotonic() < exchange.pause:
            yield None
        exchange.pause = math.inf

    def _answer(self, model: Model, name: str, data: bytes, exchange: Exchange) -> Pieces:
        """What one request to the upstream brings."""
        dialect = DIALECTS[name]
        path = request_path(name, model.provider.kind)
        reply = yield from self._sent(model.provider, path, data, exchange.sent, exchange)
        data = b""
        try:
            prompt = prompt_tokens(exchange.request)  # while the upstream works: it takes a while
            if not dialect.native:
                estimate = self.ratios.estimate(model, prompt)
                translator = new_translator(dialect, exchange, model, estimate,
                                            self.config.show_thinking)
            while not reply.head():
                yield from reply.more()
            if reply.status != 200:
                words, _ = yield from reply.whole(*ERROR_BODY)
                refusal = refusal_from_body(reply.status, words)
                native = words if dialect.native else b""
                raise refused_error(refusal, model, reply.headers, native)
            exchange.begun = True
            if dialect.native and exchange.stream:
                yield from self._handed_on(reply, exchange)
            elif dialect.native:
                yield from self._handed_on_whole(reply, exchange)
            else:
                events = self._translated(reply, translator, exchange)
                yield from answer_bytes(events, exchange.stream)
                exchange.usage = translator.usage
            self.ratios.learn(model, prompt, exchange.usage)
        finally:
            reply.release()
            exchange.reply, exchange.drained = None, False

    def _sent(self, provider: Provider, path: str, data: bytes, headers: Headers,
              exchange: Exchange) -> Generator[Piece, None, Reply]:
        if not self.upstream.sends_at_once(provider):
            yield BLOCKING
        exchange.reply = self.upstream.send(provider, "POST", path, data, headers)
        return exchange.reply

    def _translated(self, reply: Reply, translator: Translator, exchange: Exchange) -> Batches:
        """The answer's events in batches, each what came together; None where none came yet."""
        try:
            for items in upstream_items(reply):
                if items and max(map(len, items)) > LONG:
                    yield BLOCKING
                for item in items or ():
                    translator.feed(item)
                reply.complete = translator.done and not translator.writer.stopped
                exchange.drained = exchange.stream and not translator.done and reply.drained()
                yield translator.writer.take() if items is not None else None
                if translator.done:
                    return
            translator.end()
            yield translator.writer.take()
        except OgxError:  # what came before the error is the client's
            translator.writer.end_text()
            yield translator.writer.take()
            raise

    def _dialect_of(self, model: Model, request: Json) -> str:
        """The dialect for a request: the configured one, else Messages where the server has it
        and loses nothing of this request, else the other one of its kind."""
        provider, kinds = model.provider, model.provider.kind.dialects
        if provider.dialect == "auto" and speaks_responses(provider):
            return "responses"
        if provider.dialect != "auto" or len(kinds) == 1:
            return kinds[0] if provider.dialect == "auto" else provider.dialect
        if provider.kind.native_models:
            found = re.search(provider.kind.native_models, model.upstream_id)
            return "messages" if found else "chat"
        if provider.id not in self.registry.native:
            self.discovered.wait(LIST_TIMEOUT)
        native = self.registry.native.get(provider.id, False)
        return "messages" if native and not lost_natively(request, provider.kind) else kinds[-1]

    def _handed_on(self, reply: Reply, exchange: Exchange) -> Pieces:
        """A native stream's bytes, but for the model's id."""
        stream, begun = NativeStream(exchange.request["model"]), False
        while not stream.ended:
            data = reply.read()
            if data is None:
                yield None
                continue
            if not data:
                break
            events = stream.feed(data)
            if not begun and len(events) < LONG:
                raise_if_error(b"".join(SseReader().feed(events)[:1]), exchange.served)
            begun, reply.complete = begun or bool(events), stream.ended
            exchange.drained = not stream.ended and reply.drained()
            yield events
        yield stream.end()
        exchange.usage = stream.usage
        raise_if_error(stream.error, exchange.served)
        if stream.error or not stream.ended:
            raise OgxError(502, f"{exchange.served} ended the answer before it was complete")

    def _handed_on_whole(self, reply: Reply, exchange: Exchange) -> Pieces:
        """A native message, but for the model's id."""
        whole = b""
        for items in upstream_items(reply):
            whole = b"".join(items or ()) or whole
            if items is None:
                yield None
        if len(whole) > LONG:
            yield BLOCKING
        message = json_or_none(whole)
        if not isinstance(message, dict) or "content" not in message:
            raise_if_error(whole, exchange.served)
            raise unknown_data(f"{exchange.served} sent no message but", whole)
        usage = dict_or_empty(message.get("usage"))
        exchange.usage = Usage(*(whole_number(usage.get(name)) for name in USAGE_FIELDS))
        yield json_bytes({**message, "model": exchange.request["model"]})

    def count_tokens(self, exchange: Exchange) -> Pieces:
        """{"input_tokens": N}: by the upstream where it counts for free, else an estimate."""
        if not self.discovered.is_set():
            yield BLOCKING
        request, count = exchange.request, 0
        model = self._chain(request["model"])[0]
        model = taught_model(model, self.lessons.of(model))
        for paths, body in ways_to_count(self._dialect_of(model, request), request, model):
            count = yield from self._counted(model.provider, paths, body, exchange)
            if count:
                break
        count = count or self.ratios.estimate(model, prompt_tokens(request))
        counted = {"input_tokens": count, "context_management": {"original_input_tokens": count}}
        yield json_bytes(counted) + b"\n"

    def _counted(self, provider: Provider, paths: Sequence[str], body: Json,
                 exchange: Exchange) -> Generator[Piece, None, int]:
        """What the upstream counts; 0 where it doesn't, and that it has no such path is kept."""
        missing, answer = self.registry.uncounted.setdefault(provider.base_url, set()), {}
        for path in () if paths[0] in missing else paths:
            try:
                reply = yield from self._sent(provider, path, json_bytes(body), exchange.headers,
                                              exchange)
                try:
                    told, _ = yield from reply.whole(30.0, MAX_ASKED)
                finally:
                    reply.release()
            except OgxError:
                return 0
            if reply.status != 200:
                missing.update(paths[:1] if reply.status in (404, 405, 501) else ())
                return 0
            answer = dict_or_empty(json_or_none(told))
            body = {"content": answer.get("prompt") or "", "add_special": True}
        count = answer.get("input_tokens") or answer.get("count") or answer.get("tokens")
        return len(count) if isinstance(count, list) else whole_number(count)

    # -- models

    def model_list(self, query_string: str) -> Json:
        """One page that both SDKs read; without `limit` it holds all models."""
        query = dict(urllib.parse.parse_qsl(query_string[:4000]))
        self.discovered.wait(2.0)  # Claude Code waits 3 s for this list
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
        told = query.get("limit", "")
        if told and not re.fullmatch("[1-9][0-9]{0,2}|1000", told):
            raise OgxError(400, f"limit: expected a number from 1 to 1000, got '{told[:40]}'")
        limit = int(told or len(entries))
        page = rest[max(0, len(rest) - limit) :] if before else rest[:limit]
        shown = [entry["id"] for entry in page] or [None]
        return {"object": "list", "data": page, "has_more": len(page) < len(rest),
                "first_id": shown[0], "last_id": shown[-1], "tiers": self.tiers()}

    def tiers(self) -> dict[str, str]:
        """The provider's model behind each tier that has one: {"haiku": "openai/gpt-...", ...}."""
        found = {}
        for tier in TIERS:
            with suppress(OgxError):
                found[tier] = self.registry.resolve(f"claude-{tier}").served
        return found

    def model(self, model_id: str) -> Json:
        """The entry of a listed model, an alias or a tier's id. Other ids of a provider are routed
        when asked, but whether they exist only the provider knows."""
        return self._entry(self._chain(model_id)[0])

    def register(self, body: Any) -> Json:
        """Register a model id of the user's own, or register it anew; its entry."""
        self.discovered.wait(LIST_TIMEOUT)
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
        elif not self.lessons.forget(self.registry.resolve(model_id).served):
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
        known = self.registry.listed(model)
        if known is None:
            raise OgxError(404, f"model '{model.id[:200]}' is not listed by {model.provider.id}")
        alias_of = "" if model.id == known.id else known.id
        return model_entry(model, alias_of, [str(lesson) for lesson in self.lessons.of(model)])

    # -- discovery

    def start(self) -> None:
        """Look for local servers where no provider is configured, and begin discovery."""
        if not self.registry.providers:
            kinds = PROVIDER_KINDS.values() if self.config.discover_local else ()
            self.registry.adopt(local_providers(self.upstream, kinds))
        self.start_discovery()

    def start_discovery(self) -> None:
        """Ask every provider for its models, now and again from time to time, in the background;
        `discovered` is set when each has answered or failed once."""
        threading.Thread(target=self._discover, name="discovery", daemon=True).start()
        threading.Thread(target=self._keep_in_step, name="state", daemon=True).start()

    def _discover(self) -> None:
        due = dict.fromkeys(self.registry.providers, 0.0)
        while not self._stopped.is_set():
            now = time.monotonic()
            asked = [pid for pid, when in due.items() if when <= now]
            threads = [threading.Thread(target=self._list_models, args=(pid,), daemon=True)
                       for pid in asked]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(3 * LIST_TIMEOUT)
            self.discovered.set()
            for pid in asked:
                host = urllib.parse.urlsplit(self.registry.providers[pid].base_url).hostname
                soon = is_loopback(host or "") or pid in self.registry.problems
                due[pid] = time.monotonic() + (REFRESH / 20 if soon else REFRESH)
            self._stopped.wait(max(1.0, min(due.values(), default=REFRESH) - time.monotonic()))

    def _list_models(self, provider_id: str) -> None:
        """Ask one provider; a failure keeps the old list and is noted."""
        provider = self.registry.providers[provider_id]
        models, before = None, self.registry.problems.get(provider_id, "")
        try:
            models = self._models_of(provider)
            problem = "" if models else "its list holds no LLM"
            if provider_id not in self.registry.native or before:  # it may be another version now
                self._probe(provider)
        except OgxError as error:
            problem = error.without(self.upstream.secrets(provider)).message
        except Exception:  # a list that no one foresaw must not take the others down
            log.exception("reading the model list of %s", provider_id)
            problem = "its model list could not be read"
        if problem != before and self.discovered.is_set():
            log.warning("%s: %s", provider_id, problem or "its models are listed again")
        self.registry.learn(provider_id, models, problem)

    def _models_of(self, provider: Provider) -> list[Model]:
        if provider.kind is DEMO_KIND:
            return [Model("demo/echo", provider, "echo")]
        kind, models, failure = provider.kind, list[Model](), None
        lists = [(kind.list_path, ""), *kind.more_lists]
        for path, ids in lists:
            try:
                told = self.upstream.json(provider.at(path), path, LIST_TIMEOUT)
            except OgxError as error:
                if error.status in (404, 405) and path == kind.list_path != "/models":
                    lists.append(("/models", ""))
                else:
                    failure = failure or error
                continue
            models += [m for m in models_from_list(provider, told) if re.search(ids, m.upstream_id)]
            last = dict_or_empty(told).get("has_more") and told.get("last_id")
            if last and len(lists) < MAX_PAGES:  # Anthropic's pages
                path = f"{kind.list_path}{'&' if '?' in kind.list_path else '?'}after_id="
                lists.append((path + urllib.parse.quote(str(last), safe=""), ids))
        if failure and not (models and kind.more_lists):
            raise failure
        with suppress(OgxError):  # what it tells is welcome, not needed
            if kind.loaded_path:
                loaded = self.upstream.json(provider, kind.loaded_path, LIST_TIMEOUT)
                models = [with_loaded_context(model, loaded) for model in models]
        return models

    def _probe(self, provider: Provider) -> None:
        """Learn whether a server has a Messages API from what it says to an empty request, which
        costs nothing: only one that knows the path complains about the body."""
        kind = provider.kind
        if kind.dialects != BOTH or provider.dialect != "auto" or kind.native_models:
            return
        try:
            reply, _ = self.upstream.ask(provider, provider.kind.messages_path, LIST_TIMEOUT, b"{}")
        except OgxError:
            return
        if reply.status in (400, 404, 405, 422, 500, 501):
            self.registry.native[provider.id] = reply.status in (400, 422, 500)
            self.registry.uncounted.pop(provider.base_url, None)

    def close(self) -> None:
        self._stopped.set()
        self.upstream.close()
        self.upstream.signer.close()
        self.store.close()


def local_providers(upstream: Upstream, kinds: Iterable[ProviderKind],
                    timeout: float = 0.2) -> list[Provider]:
    """Servers at their usual loopback ports that identify themselves as what belongs there."""
    found: dict[str, Provider] = {}

    def look(kind: ProviderKind) -> None:
        provider = Provider(kind.name, kind, f"http://127.0.0.1:{kind.local_port}/v1")
        path, mark = kind.identity
        try:
            reply, body = upstream.ask(provider, path, timeout)
        except OgxError:
            return
        if reply.status == 200 and "".join(mark.split()).encode() in b"".join(body.split()):
            found[kind.name] = provider

    kinds = [kind for kind in kinds if kind.local_port]
    threads = [threading.Thread(target=look, args=(kind,), daemon=True) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout * 3)
    return [found[kind.name] for kind in kinds if kind.name in found]


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
    writer = MessageWriter(message, used, request.get("stop_sequences") or (), hides)
    return dialect.translator(writer, request, model)


def answer_bytes(batches: Batches, stream: bool) -> Pieces:
    """Batches of events as server-sent events or, at the end, as one message."""
    folder = MessageFolder()
    for batch in batches:
        if not isinstance(batch, list):
            yield batch
        elif stream:
            yield b"".join(map(sse_bytes, batch))
        else:
            for event in batch:
                folder.add(event)
            if folder.size > MAX_ANSWER:
                raise OgxError(502, "the upstream's answer is too large")
            yield b""  # others may have their turn
    if not stream:
        if folder.size > LONG:
            yield BLOCKING
        yield json_bytes(folder.message())


def refused_error(refusal: Refusal, model: Model, headers: Headers, native: bytes) -> OgxError:
    """The error for a refusal that nothing helps against. `native` is the body of an upstream that
    speaks Messages: in Anthropic's shape it is handed on, since clients read its wording."""
    error = upstream_error(refusal, model.origin, headers)
    theirs = dict_or_empty(json_or_none(native))
    reason = dict_or_empty(theirs.get("error")).get("message")
    if theirs.get("type") == "error" and reason == without_controls(refusal.message):
        error.raw, error.status = json_bytes(theirs), refusal.status  # escapes could hide a key
    elif error.status == 401:
        hint = " or ".join(model.provider.kind.key_vars + model.provider.kind.signed_by)
        hint = "the clock" if re.search("Z is (now|still) ", error.message) else hint or "api_key"
        error.message += f"; check {hint} where ogx.py runs"
    return error


def told_error(error: OgxError, exchange: Exchange, model: Model, body: Json) -> OgxError:
    """The error as the client understands it best: a prompt that is too long in those words."""
    if error.refusal is None or "prompt is too long" in error.message:
        return error
    count = round(sum(prompt_tokens(exchange.request)))
    asked = max(body.get(name, 0) for name in LIMIT_FIELDS)
    return overflow_error(error.refusal, count, model.context, asked) or error


def raise_if_error(answer: bytes, origin: str) -> None:
    """Raise the error that a native answer, or an event of one, is."""
    node = json_or_none(answer)
    if isinstance(node, dict) and is_failure(node):
        raise upstream_error(refusal_from_body(200, answer), origin, {})


def is_passing(error: OgxError) -> bool:
    """Whether another upstream, or the same one later, may do better."""
    return error.status in PASSING or error.status == 402 or error.type == "billing_error"


def pause_before(error: OgxError, retries: int, backoff: float) -> float | None:
    """Seconds before a request is sent again; None when that is no use, or up to the client."""
    if error.status not in PASSING or error.headers.get("x-should-retry") == "false":
        return None
    if error.status == 504 and error.refusal is None:  # our own time limit: it was long enough
        return None
    told = error.headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", told):
        return float(told)
    return None if told else backoff * 2**retries * random.uniform(0.8, 1.2)


def upstream_items(reply: Reply) -> Iterator[list[bytes] | None]:
    """The data of the server-sent events that came together, or a whole body as one; None where
    nothing is there yet."""
    reader, whole = SseReader(), bytearray()
    is_whole: bool | None = None
    while True:
        data = reply.read()
        if data is None:
            yield None
            continue
        if not data:
            break
        if is_whole is None:  # told by the data, since content types lie; no stream begins so
            if not data.strip():  # DeepSeek sends empty lines to keep the connection
                yield []
                continue
            is_whole = data.lstrip()[:1] in (b"{", b"[", b"<")
        if not is_whole:
            yield reader.feed(data)
            continue
        whole += data
        if len(whole) > MAX_ANSWER:
            raise OgxError(502, "the upstream's answer is too large")
    yield [bytes(whole)] if whole else reader.end()


def model_entry(model: Model, alias_of: str = "", learned: Sequence[str] = ()) -> Json:
    """A model as OpenAI's list and Anthropic's both have it; custom_metadata is OGX's."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(model.created))
    noted = {"alias_of": alias_of, "warning": model.warning, "learned": learned}
    metadata = {"model_type": "llm", "provider_id": model.provider.id,
                "provider_resource_id": model.upstream_id,
                **{name: value for name, value in noted.items() if value}}
    return {
        "id": model.id, "object": "model", "created": model.created, "owned_by": model.provider.id,
        "type": "model", "display_name": model.id, "created_at": created, "lifecycle": "active",
        "capabilities": None, "max_input_tokens": model.context, "max_tokens": model.max_output,
        "custom_metadata": metadata}


def with_loaded_context(model: Model, loaded: Any) -> Model:
    """The model with the context it has in its server's memory, and a warning if that is small.
    Ollama cuts prompts that are longer than it in silence, from the front."""
    entries = dict_or_empty(loaded).get("models")
    for entry in map(dict_or_empty, entries if isinstance(entries, list) else ()):
        context = first_number(entry, ("context_length",))
        if context and model.upstream_id in (entry.get("name"), entry.get("model")):
            hint = model.provider.kind.context_hint
            words = f"a context of {context:,} tokens is too small for Claude Code; {hint}"
            warning = words if context < MIN_CONTEXT else ""
            return replace(model, context=context, warning=warning)
    return model


# ======== Server =============================================================================
# HTTP for the clients: guard, read, route, write, log. Everything that can be wrong with a
# request ends as one error in Anthropic's shape. A connection is served in steps, each as far as
# goes without waiting, by one thread for all; what may block gets a thread of its own.

KEEP_ALIVE = 300.0  # seconds an idle connection stays open
ANTHROPIC_VERSION = "2023-06-01"
PASSED_HEADERS = ("anthropic-beta", "anthropic-version")  # to upstreams that speak Messages
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
SIGN_OF_LIFE = b": waiting for the model\n\n"  # before message_start only comments may come
LOGGED_BODY = LOG_LINE - 200  # characters; the line is cut at so many bytes
FILE_OR_KEY = re.compile(r"[A-Za-z0-9+/=]{200,}|\b(?<=sk-)[\w-]{8,}")
ABOUT = {"service": "ogx.py", "version": __version__, "status": "OK"}
SHARE = 0.002  # seconds for which a connection, or new requests, may hold up the others at a time
# What a connection waits for, besides BLOCKING.
READS, WRITES, ANSWER = "the client writes", "the client reads", "the upstream answers"
AGAIN = "the others"  # it could go on, but they come first
Step = Union[str, Literal[False]]
Steps = Generator[Step, None, Any]  # of a connection: what each waits for
UNSERVED = ("/v1/messages/batches", "/v1/files", "/v1/skills")


class Server(http.server.ThreadingHTTPServer):
    """A gateway on a listening socket; port 0 takes a free one. `url` tells where it listens."""

    daemon_threads = True
    request_queue_size = 1024  # with fewer, a burst of clients loses SYNs and waits a second
    allow_reuse_address = os.name != "nt"  # on Windows it would let two programs share the port

    def __init__(self, gateway: Gateway, host: str = DEFAULT_HOST, port: int = 0,
                 token: str = "", tls: ssl.SSLContext | None = None) -> None:
        self.tls, self.log_bodies = tls, False
        self.gateway, self.limits = gateway, gateway.config.limits
        self.token = token.encode()  # which clients must show; empty: everyone may come in
        self.stopping = False
        self.relay = Relay()
        self.running: set[Handler] = set()  # those with a request
        self._done = threading.Condition()
        self._idle: dict[socket.socket, None] = {}  # connections without a request, oldest first
        self.host = host.strip("[]")
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
        return f"{'https' if self.tls else 'http'}://{host}:{self.server_port}"

    def start(self, poll: float = 0.1) -> None:
        """Serve in a thread of its own until stop(), which it notices within `poll` seconds."""
        threading.Thread(target=self.relay.run, name="relay", daemon=True).start()
        threading.Thread(target=self.serve_forever, args=(poll,), daemon=True).start()

    def stop(self, drain: float | None = None) -> None:
        """Accept no more, let running answers finish for `drain` seconds (by default as the
        configuration says), end the others with an error, close."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        self._close_idle(0)
        with self._done:
            patience = self.limits.drain_timeout if drain is None else drain
            self._done.wait_for(lambda: not self.running, patience)
            self.relay.interrupt()
            self.gateway.close()
            self._done.wait_for(lambda: not self.running, 2.0)
        self.relay.close()

    def ended(self, handler: Handler) -> None:
        """A connection's request runs no more."""
        self.running.discard(handler)
        if self.stopping:
            with self._done:
                self._done.notify_all()

    def idle(self, connection: socket.socket, waits: bool) -> None:
        """Note that a connection waits for a request, or no more; too many close the oldest."""
        self._idle.pop(connection, None)
        if waits:
            self._idle[connection] = None
            self._close_idle(0 if self.stopping else int(self.limits.max_idle))

    def _close_idle(self, kept: int) -> None:
        surplus = len(self._idle) - kept
        for connection in list(self._idle)[:surplus] if surplus > 0 else ():
            self._idle.pop(connection, None)
            with suppress(OSError):  # the relay sees its end and closes it
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
        """A new connection goes to the relay, and gets no thread."""
        self.process_request_thread(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            if self.tls:
                request = self.tls.wrap_socket(request, True, do_handshake_on_connect=False)
            super().finish_request(request, client_address)
        except OSError:  # it has gone already
            request.close()

    def shutdown_request(self, request: Any) -> None:
        """Not yet: the relay has the connection."""

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


class Relay:
    """One thread that goes on with every connection that can go on: with a thread for each, most
    of the time would go into switching between them. What may block, or takes long, runs in a
    thread of its own, and comes back."""

    def __init__(self) -> None:
        self._handlers: dict[Handler, None] = {}  # those that no thread has, the newest last
        self._turns: dict[Handler, None] = {}  # those that can go on, the next one first
        self._new: list[tuple[Handler, str]] = []
        self._alarm = math.inf  # when the first of them may have waited for too long
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._interrupted = self._closed = False

    def add(self, handler: Handler, step: str = AGAIN) -> None:
        """Take in a connection, a new one or one that a thread is done with for now."""
        with self._lock:
            if not self._closed:
                self._new.append((handler, step))
                return self._ring()
        handler.end()

    def _ring(self) -> None:
        with suppress(OSError):  # it is full of rings, heard soon anyway; or it has ended
            self._bell.send(b"!")

    def interrupt(self) -> None:
        """Have what runs end with an error."""
        self._interrupted = True
        self._ring()

    def close(self) -> None:
        """End at once."""
        with self._lock:
            self._closed = True
            self._ring()

    def run(self) -> None:
        """Serve until close(). Answers that run come first: a request that comes in may have to
        wait for its turn, and is then read and translated."""
        try:
            while not self._closed:
                for key in self._ready():
                    handler = key.data
                    if handler is None:
                        self._admit()
                    elif handler.waits is READS:
                        self._turns[handler] = None
                    elif handler in self._handlers and handler.waits is not AGAIN:
                        self._go_on(handler, key.fileobj)
                now = time.monotonic()
                if now >= self._alarm:
                    self._wake(now)
                while self._turns and time.monotonic() - now < SHARE:
                    handler = next(iter(self._turns))
                    del self._turns[handler]
                    self._go_on(handler)
        finally:
            self.close()
            for handler in [*self._handlers, *(handler for handler, _ in self._new)]:
                handler.end()
            for closable in (self._selector, self._bell, self._ear):
                closable.close()

    def _ready(self) -> list[selectors.SelectorKey]:
        """What happened, once something has."""
        patience = 0.0 if self._turns else max(0.0, self._alarm - time.monotonic())
        try:
            ready = self._selector.select(None if patience == math.inf else patience)
        except ValueError:  # more sockets than select() takes, on Windows
            if not self._handlers:
                raise
            self._drop(next(reversed(self._handlers)))
            return []
        return [key for key, _ in ready]

    def _admit(self) -> None:
        self._ear.recv(1000)
        for _ in range(len(self._new)):
            handler, step = self._new.pop(0)
            self._handlers[handler] = None
            self._wait(handler, step)
        if self._interrupted:
            for handler in list(self._handlers):
                if not handler.interrupted:
                    handler.interrupted = True
                    self._go_on(handler, error=stopping_error())

    def _wake(self, now: float) -> None:
        """Let those go on that have waited for too long, and set the alarm for the others."""
        self._alarm = math.inf
        for handler in self._handlers:
            if handler.until <= now:
                self._turns[handler] = None
            else:
                self._alarm = min(self._alarm, handler.until)

    def _go_on(self, handler: Handler, ready: Any = None, error: OgxError | None = None) -> None:
        if handler not in self._handlers:
            return  # it ended a moment ago
        if ready is handler.connection and handler.waits is ANSWER:
            gone = handler.is_gone()
            if not gone:
                if gone is False:
                    self._watch(handler, 0, *handler.watched[1:])
                    self._alarm = min(self._alarm, handler.until)
                return
            error = client_gone()
        self._wait(handler, handler.next_step(error))

    def _wait(self, handler: Handler, step: Step | None) -> None:
        """Have a connection wait for what its step says; None is its end."""
        try:
            self._arrange(handler, step)
        except Exception:  # nothing of one connection may end the others
            log.exception("a connection is lost")
            self._drop(handler)

    def _drop(self, handler: Handler) -> None:
        self._handlers.pop(handler, None)
        self._turns.pop(handler, None)
        for sock in filter(None, (handler.connection, handler.watched[1])):
            with suppress(Exception):
                self._selector.unregister(sock)
        handler.end()

    def _arrange(self, handler: Handler, step: Step | None) -> None:
        handler.waits = step
        reply = handler.exchange.reply
        source = reply.socket if reply else None
        if step is AGAIN:
            self._turns[handler] = None
            if source is not handler.watched[1]:  # which another connection may have by now
                self._watch(handler, handler.watched[0])
        elif step is None or step is BLOCKING:
            self._watch(handler, 0)
            self._handlers.pop(handler, None)
            self._turns.pop(handler, None)
            if step is BLOCKING:
                self._start_thread(handler)
        else:
            events = selectors.EVENT_WRITE if step is WRITES else selectors.EVENT_READ
            source = source if step is ANSWER else None
            self._watch(handler, events, source, reply.events if reply and source else 0)
            self._alarm = min(self._alarm, handler.until)

    def _start_thread(self, handler: Handler) -> None:
        try:
            threading.Thread(target=self._block, args=(handler,), daemon=True).start()
        except RuntimeError:  # the system has no more
            self._handlers[handler] = None
            self._wait(handler, handler.next_step(OgxError(529, "no thread is left for this")))

    def _block(self, handler: Handler) -> None:
        """Do what may block, in a thread of its own."""
        step: Any = BLOCKING
        while step is BLOCKING:
            gone = handler.is_gone()
            if gone is False:  # it may have left: that shows in a moment
                time.sleep(0.05)
                gone = handler.is_gone()
            step = handler.next_step(client_gone() if gone else None)
        if step is not None:
            self.add(handler, step)

    def _watch(self, handler: Handler, events: int, source: socket.socket | None = None,
               source_events: int = 0) -> None:
        """Watch a connection and the upstream's for these events, and nothing else any more."""
        wanted, old = (events, source, source_events), handler.watched
        if wanted == old:
            return
        handler.watched = wanted
        self._register(handler, handler.connection, old[0], events)
        if old[1] is not source and old[1] is not None:
            self._register(handler, old[1], old[2], 0)
        if source is not None:
            known = old[2] if old[1] is source else 0
            self._register(handler, source, known, source_events)

    def _register(self, handler: Handler, sock: socket.socket, old: int, events: int) -> None:
        if old != events:
            with suppress(ValueError):  # it is closed
                if old:
                    self._selector.unregister(sock)
                if events:
                    self._selector.register(sock, events, handler)


class Handler(http.server.BaseHTTPRequestHandler):
    """One client connection."""

    server: Server

    def setup(self) -> None:
        self.connection: socket.socket = self.request
        self.connection.setblocking(False)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""  # and not yet read
        self._unsent: bytes | memoryview = b""  # what the client was too slow to take
        self._resumed = 0.0  # when its step began
        self.steps, self.exchange, self.status = self._requests(), Exchange(""), 0
        # The relay's: what is waited for and until when, what is watched for that.
        self.waits: Step | None = None
        self.until = math.inf
        self.watched: tuple[int, socket.socket | None, int] = (0, None, 0)
        self.interrupted = False

    def handle(self) -> None:
        """Leave the connection to the relay."""
        self.server.relay.add(self)

    def finish(self) -> None:
        pass

    def end(self) -> None:
        """Close the connection now; steps that had not begun would not."""
        self.steps.close()
        self.connection.close()

    def next_step(self, error: OgxError | None = None) -> Step | None:
        """Go on as far as goes without waiting; what is waited for then, None at the end."""
        self._resumed = time.monotonic()
        try:
            return self.steps.throw(error) if error else next(self.steps)
        except StopIteration:
            return None
        except OgxError:  # it was interrupted before it began
            self.end()
            return None
        except Exception:
            log.exception("a connection failed unexpectedly")
            return None

    def is_gone(self) -> bool | None:
        """Whether the client left while it waits for an answer; None where it did nothing. It may
        have sent its next request, or closed its own side alone: what is then written to it tells,
        since who left refuses that in a moment."""
        if len(self._received) > MAX_HEAD:  # of requests to come: the rest can wait
            return False
        try:
            data = received(self.connection)
            if data:
                self._received += data
            elif data == b"":
                if self.server.tls or not (self.status or self.request_version == "HTTP/1.1"):
                    return True
                self.connection.send(self.framed(SIGN_OF_LIFE) if self.status else CONTINUE)
                self.until = min(self.until, time.monotonic() + 0.2)
        except OSError:
            return True
        return None if data is None else False

    def _shaken(self) -> Steps:
        """TLS's handshake."""
        self.server.idle(self.connection, True)
        self.until = time.monotonic() + self.server.limits.client_timeout
        while isinstance(self.connection, ssl.SSLSocket):
            try:
                return self.connection.do_handshake()
            except ssl.SSLWantReadError:
                yield READS
            except ssl.SSLWantWriteError:
                yield WRITES
            if time.monotonic() >= self.until:
                raise socket.timeout("the handshake took too long")

    def _requests(self) -> Steps:
        """Serve one request after the other."""
        self.close_connection = False
        try:
            yield from self._shaken()
            while not self.close_connection:
                yield from self._one_request()
                if self._gives_way():
                    yield AGAIN
        except (OSError, EOFError, OgxError) as error:  # the client left or was too slow
            log.debug("%s: connection lost: %s", self.exchange.request_id, error)
        finally:
            self.server.idle(self.connection, False)
            self.connection.close()

    def _one_request(self) -> Steps:
        self.close_connection = True
        self.exchange = Exchange(fresh_id("req"))
        self.status, self._unread = 0, False
        self.command = self.path = ""
        head = yield from self._read_head()
        if head:
            self.exchange.started = time.monotonic()
            self.server.running.add(self)
            try:
                yield from self._answer(head)
            finally:
                self.server.ended(self)

    def _receive(self, size: int = RECEIVE_SIZE) -> Generator[Step, None, bytes]:
        """Bytes from the client, b"" at its end; socket.timeout after the time for a request, to
        which 50 KB add a second."""
        data = received(self.connection, size)
        while data is None:
            if time.monotonic() >= self._deadline:
                raise socket.timeout("the client was too slow")
            self.until = self._deadline
            yield READS
            data = received(self.connection, size)
        self._deadline += len(data) / 50_000
        if self._gives_way():
            yield AGAIN
        return data

    def _gives_way(self) -> bool:
        """Whether it is the others' turn."""
        return time.monotonic() - self._resumed > SHARE

    def _read_head(self) -> Generator[Step, None, bytes]:
        """A request's head without its last line break, too long if it has no end; b"" when the
        client closed."""
        self._received = self._received.lstrip(b"\r\n")
        if not self._received:
            self.server.idle(self.connection, True)
            self._deadline = time.monotonic() + KEEP_ALIVE
            self._received = (yield from self._receive()).lstrip(b"\r\n")
            self.server.idle(self.connection, False)
        self._deadline = time.monotonic() + self.server.limits.client_timeout
        end, looked = HEAD_END.search(self._received), 0
        while not end and len(self._received) <= MAX_HEAD:
            data = yield from self._receive()
            if not data:
                return b""
            looked = max(0, len(self._received) - 2)
            self._received = (self._received + data).lstrip(b"\r\n")
            end = HEAD_END.search(self._received, looked)
        if not end:
            return self._received
        head, self._received = self._received[: end.start()], self._received[end.end() :]
        return head

    def _answer(self, head: bytes) -> Steps:
        try:
            self._take_head(head)
            self.exchange.raw = yield from self._read_body()
            yield from self._route()
        except OgxError as error:
            yield from self._send_error(error)
        except socket.timeout:
            yield from self._send_error(OgxError(408, "the request took too long to come in"))
        except ConnectionError:
            self.close_connection = True
            self.status = self.status or CLIENT_GONE
        except RecursionError:
            yield from self._send_error(OgxError(400, "the request's JSON is nested too deeply"))
        except Exception:
            log.exception("%s: unexpected error", self.exchange.request_id)
            words = "internal error; the log of ogx.py has the trace"
            yield from self._send_error(OgxError(500, words))
        self._log()

    def _take_head(self, head: bytes) -> None:
        """Take in a request's head; OgxError for what is malformed or kept out."""
        self._unread = len(head) > MAX_HEAD
        if self._unread:
            raise OgxError(431, "the request's headers are too large")
        self._parse_head(head)
        headers = self.request_headers
        self.close_connection = self.server.stopping or self._closes
        self._unread = "content-length" in headers or "transfer-encoding" in headers
        self.exchange.session = headers.get("x-claude-code-session-id", "")[:64]
        self.exchange.headers = self._passed
        self._guard()

    def _parse_head(self, head: bytes) -> None:
        """Read the request line and headers; OgxError(400) for anything malformed."""
        first, _, lines = head.partition(b"\n")
        match = REQUEST_LINE.fullmatch(first)
        if not match:
            raise OgxError(400, "malformed request line")
        self.command = match.group(1).decode()
        self.path = match.group(2).decode()
        self.request_version = "HTTP/" + match.group(3).decode()
        headers = self.request_headers = headers_from_bytes(lines)
        connection = headers.get("connection", "").lower()  # may name headers for us alone
        self._passed = {name: headers[name] for name in PASSED_HEADERS
                        if name in headers and name not in connection}
        old = self.request_version == "HTTP/1.0" and (
            "keep-alive" not in connection or "transfer-encoding" in headers)
        self._closes = "close" in connection or old

    def _read_body(self) -> Generator[Step, None, bytes]:
        """The request's body, unpacked. Both lengths at once, or two, are how requests are
        smuggled past a proxy: refused, and the connection closed."""
        headers = self.request_headers
        length, coding = headers.get("content-length"), headers.get("transfer-encoding")
        if length is None and coding is None:
            return b""
        if len(self.server.running) > self.server.limits.max_requests:
            words = "too many requests are running already (see OGX_MAX_REQUESTS)"
            raise OgxError(529, words, headers={"retry-after": "1"})
        limit = int(self.server.limits.max_body * 1024 * 1024)
        if coding is not None:
            if length is not None or coding.lower() != "chunked":
                raise OgxError(400, "transfer-encoding: expected chunked alone, without a length")
        elif not re.fullmatch("[0-9]{1,18}", length or ""):
            raise OgxError(400, "content-length: expected one whole number")
        check_size(int(length or 0), limit)
        if headers.get("expect", "").lower() == "100-continue":
            yield from self._write(CONTINUE)
        data = yield from self._sized(int(length)) if length else self._chunked(limit)
        self._unread, coding = False, headers.get("content-encoding", "identity").lower()
        if len(data) > LONG or coding != "identity":
            yield BLOCKING
        return unpacked(data, coding, limit)

    def _sized(self, length: int) -> Generator[Step, None, bytes]:
        """A body of known length."""
        pieces, missing = [self._received], length - len(self._received)
        while missing > 0:
            pieces.append((yield from self._more_body(4 * RECEIVE_SIZE)))
            missing -= len(pieces[-1])
        data = b"".join(pieces)
        self._received = data[length:]
        return data[:length]

    def _chunked(self, limit: int) -> Generator[Step, None, bytes]:
        """A body in chunks, which can be so small that many take a while to read."""
        reader = BodyReader(200, {"transfer-encoding": "chunked"})
        pieces = [reader.feed(self._received)]
        size = len(pieces[0])
        while not reader.done:
            pieces.append(reader.feed((yield from self._more_body(RECEIVE_SIZE))))
            size += len(pieces[-1])
            check_size(size, limit)
        self._received = reader.rest
        return b"".join(pieces)

    def _more_body(self, size: int) -> Generator[Step, None, bytes]:
        data = yield from self._receive(size)
        if not data:
            raise ConnectionResetError("the client closed in the middle of its request")
        return data

    def _guard(self) -> None:
        """Keep browsers out: a page that a user visits must not be able to spend their keys, by
        its own name for 127.0.0.1 (DNS rebinding), across origins, or by a form."""
        headers = self.request_headers
        host = headers.get("host", "")
        if "," in host or ("host" not in headers and self.request_version == "HTTP/1.1"):
            raise OgxError(400, "host: expected one")
        open_to_names = bool(self.server.token) and not is_loopback(self.server.host)
        names = self.server.gateway.config.host_names
        if not open_to_names and not host_allowed(host, self.server.host, names):
            raise OgxError(403, f"host '{host[:100]}' is not a name of this server; if it should "
                                "be, add it to server.host_names in the configuration")
        if headers.get("x-ogx-instance") == self.server.gateway.upstream.instance:
            raise OgxError(400, "a provider's base_url points back at ogx.py itself",
                           headers={"x-should-retry": "false"})
        if self.server.token and not shows_token(headers, self.server.token):
            raise OgxError(401, "this server asks for its token, as Authorization: Bearer or "
                                "x-api-key", headers={"x-should-retry": "false"})
        origin = headers.get("origin")
        foreign = origin is not None and origin != (
            f"{'https' if self.server.tls else 'http'}://{host}")
        # Without an Origin: images and the like, and links, which may lead to the plain page.
        linked = headers.get("sec-fetch-mode") == "navigate" and self.path == "/"
        if foreign or (headers.get("sec-fetch-site") in ("cross-site", "same-site") and not linked):
            raise OgxError(403, "requests from web pages of another origin are refused")

    def _route(self) -> Steps:
        path, _, query = self.path.partition("?")
        if path.startswith("/"):
            path = re.sub("//+", "/", path)  # as after a base URL that ends in one
        else:
            path = re.sub("^https?://[^/]*", "", path)
        routes, argument = Handler.ROUTES.get(path), query
        if path.startswith("/v1/models/"):
            routes = Handler.ROUTES["/v1/models/{id}"]
            argument = urllib.parse.unquote(path[len("/v1/models/") :])
        if routes is None:
            raise OgxError(404, not_served_words(path))
        method = "GET" if self.command == "HEAD" else self.command
        content_type = self.request_headers.get("content-type", "").partition(";")[0].strip(" \t")
        if method == "POST" and content_type.lower() not in ("", "application/json"):
            raise OgxError(415, f"content-type: expected application/json, got {content_type}")
        if method not in routes:
            allowed = ", ".join([*routes, *["HEAD"] * ("GET" in routes)])
            raise OgxError(405, f"{self.command} is not possible on {path}, only {allowed}",
                           headers={"allow": allowed})
        answer = routes[method](self, argument)
        if isinstance(answer, dict):
            yield from self._send(200, json_bytes(answer) + b"\n")
        else:
            yield from answer

    # -- endpoints: each gives the JSON to answer, or the steps of answering

    def _post_messages(self, query: str) -> Steps:
        self.exchange.request = checked_json(self.exchange.raw)
        with closing(self.server.gateway.messages(self.exchange)) as pieces:
            kept = self._kept(pieces) if self.server.log_bodies else pieces
            yield from (self._stream(kept) if self.exchange.stream else self._whole(kept))

    def _kept(self, pieces: Pieces) -> Pieces:
        """The answer's pieces; the request and they are logged."""
        self._log_body("request", self.exchange.raw)
        answer = bytearray()
        try:
            for piece in pieces:
                answer += piece if piece and len(answer) < 100 * LOGGED_BODY else b""
                yield piece
        finally:
            pieces.close()
            self._log_body("answer", answer)

    def _post_count_tokens(self, query: str) -> Steps:
        self.exchange.request = checked_json(self.exchange.raw, counting=True)
        with closing(self.server.gateway.count_tokens(self.exchange)) as pieces:
            yield from self._whole(pieces)

    def _in_thread(self, answer: Callable[[Any], Json], asked: Any) -> Steps:
        """What a method of the gateway gives that may wait, for lists or a disk."""
        yield BLOCKING
        yield from self._send(200, json_bytes(answer(asked)) + b"\n")

    ROUTES: ClassVar[dict[str, dict[str, Callable[[Handler, str], Json | Steps]]]] = {
        "/v1/messages": {"POST": _post_messages},
        "/v1/messages/count_tokens": {"POST": _post_count_tokens},
        "/v1/models": {
            "GET": lambda self, query: self._in_thread(self.server.gateway.model_list, query),
            "POST": lambda self, _: self._in_thread(self.server.gateway.register,
                                                    parsed_json(self.exchange.raw))},
        "/v1/models/{id}": {
            "GET": lambda self, known: self._in_thread(self.server.gateway.model, known),
            "DELETE": lambda self, known: self._in_thread(self.server.gateway.unregister, known)},
        **dict.fromkeys(("/v1/health", "/api/hello", "/"), {"GET": lambda self, query: ABOUT}),
    }

    # -- answers

    def _whole(self, pieces: Pieces) -> Steps:
        """Write an answer that isn't streamed."""
        whole = []
        for piece in pieces:
            if piece:
                whole.append(piece)
            step = self._step_after(piece)
            if step is not None:
                yield step
        yield from self._send(200, b"".join(whole))

    def _stream(self, pieces: Pieces) -> Steps:
        """Write a stream as it comes; an error before its first piece is the caller's to answer."""
        done, tick, written_at = self.exchange, self.server.gateway.tick, time.monotonic()
        try:
            for piece in pieces:
                now, data = time.monotonic(), piece or b""
                if data:
                    done.first_event = done.first_event or now
                elif now - written_at >= tick:
                    data = PING if done.first_event else SIGN_OF_LIFE
                if data:
                    yield from self._send_piece(data)
                    written_at = now
                step = self._step_after(piece, written_at + tick)
                if step is not None:
                    yield step
        except OgxError as error:
            if not self.status or error.status == CLIENT_GONE:
                raise
            self.exchange.error = f"the stream broke: {error.message}"
            yield from self._send_piece(sse_bytes(error.body(self.exchange.request_id)))
        yield from self._write(self.framed(b""))

    def _step_after(self, piece: Piece, until: float = math.inf) -> Step | None:
        """What an empty piece stands for; after others now and then the other connections' turn."""
        done = self.exchange
        if piece is BLOCKING:
            return BLOCKING
        if piece is None or done.drained:
            done.drained = False
            self.until = min(until, done.pause, done.reply.until if done.reply else math.inf)
            return ANSWER
        return AGAIN if self._gives_way() else None

    def _send_piece(self, data: bytes) -> Steps:
        """One piece of a stream; the head goes with the first."""
        data = self.framed(data)
        if not self.status:
            headers = {"content-type": "text/event-stream", "cache-control": "no-cache"}
            if self.request_version == "HTTP/1.1":
                headers["transfer-encoding"] = "chunked"
            else:
                self.close_connection = True
            data = self._head(200, headers) + data
        yield from self._write(data)

    def framed(self, data: bytes) -> bytes:
        """A piece of a stream as one chunk, for clients that know chunks."""
        if self.request_version != "HTTP/1.1":
            return data
        return b"%x\r\n%b\r\n" % (len(data), data)

    def _write(self, data: bytes) -> Steps:
        """Send it all, after what is still unsent; socket.timeout once the client took nothing for
        too long."""
        self._unsent = bytes(self._unsent) + data
        until = time.monotonic() + self.server.limits.client_timeout
        while self._unsent:
            try:
                sent = self.connection.send(self._unsent)
            except WOULD_BLOCK:
                if time.monotonic() >= until:
                    raise socket.timeout("the client reads nothing") from None
                self.until = until
                yield WRITES
                continue
            until = time.monotonic() + self.server.limits.client_timeout
            self._unsent = memoryview(self._unsent)[sent:] if sent < len(self._unsent) else b""

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] = {}) -> Steps:
        fields = {"content-type": "application/json", "content-length": str(len(data)), **headers}
        head = self._head(status, fields)
        yield from self._write(head if self.command == "HEAD" else head + data)

    def _send_error(self, error: OgxError) -> Steps:
        """Answer with an error where an answer is still possible."""
        if self.status or error.status == CLIENT_GONE:
            self.close_connection = True
            self.status = self.status or error.status
            return
        self.close_connection = self.close_connection or self._unread or not self.command
        self.exchange.error = error.message
        body = error.raw or json_bytes(error.body(self.exchange.request_id)) + b"\n"
        yield from self._send(error.status, body, error.headers)
        if self._unread:
            yield from self._linger()

    def _linger(self) -> Steps:
        """Read on for a moment: closing at once on unread data would reset the connection, and
        the client would never see the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.until = time.monotonic() + 2.0
        while received(self.connection) != b"" and time.monotonic() < self.until:
            yield READS

    def _head(self, status: int, headers: Headers) -> bytes:
        """The head of an answer, as bytes; from here on the answer counts as sent."""
        self.status = status
        fields = {"request-id": self.exchange.request_id, **headers}
        if self.exchange.served:
            fields["x-ogx-served"] = one_line(self.exchange.served)
        if self.close_connection:
            fields["connection"] = "close"
        lines = [head_start(status, int(time.time())), *map(": ".join, fields.items()), "", ""]
        return "\r\n".join(lines).encode("ascii", "replace")

    def _log(self) -> None:
        """One line per request; what clients and monitors ask all the time only at DEBUG."""
        done, usage = self.exchange, self.exchange.usage
        served = f"{done.served} by {done.dialect}" if done.served else "nothing"
        path = cut(self.path.partition("?")[0], 200)
        parts: list[Any] = [
            f"{done.request_id} {self.command} {path} {self.status}",
            done.asked and f"{done.asked} -> {served}",
            done.first_event and f"first {done.first_event - done.started:.3f}s",
            f"total {time.monotonic() - done.started:.3f}s",
            usage and f"in {usage.input} cached {usage.cache_read} out {usage.output}",
            done.session and f"session {done.session}",
            done.dropped and f"dropped: {done.dropped}",
            done.error and f"error: {one_line(done.error)}",
        ]
        quiet = not done.error and path in ("/v1/health", "/api/hello")
        level = logging.DEBUG if quiet else logging.INFO
        log.log(level, " ".join(filter(None, parts)))

    def _log_body(self, name: str, body: bytes | bytearray) -> None:
        """A body on one line, without keys and files, not too long."""
        gateway = self.server.gateway
        keys = [gateway.upstream.secrets(p) for p in gateway.registry.providers.values()]
        text = cut(body[: 8 * LOGGED_BODY].decode("utf-8", "replace"), 2 * LOGGED_BODY)
        for secret in sum(keys, [self.server.token.decode()] * bool(self.server.token)):
            text = text.replace(secret, "***")
        shown = cut(" ".join(FILE_OR_KEY.sub("***", text).split()), LOGGED_BODY)
        log.info("%s %s %s", self.exchange.request_id, name, shown)


@functools.lru_cache(maxsize=8)
def head_start(status: int, seconds: int) -> str:
    """What the heads of all answers of one second begin with."""
    reason = http.client.responses.get(status, "Overloaded" if status == 529 else "Error")
    date = email.utils.formatdate(seconds, usegmt=True)
    return f"HTTP/1.1 {status} {reason}\r\ndate: {date}\r\nanthropic-version: {ANTHROPIC_VERSION}"


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
    unpacker = zlib.decompressobj(47)
    try:
        plain = unpacker.decompress(data, limit + 1)
    except zlib.error:
        raise OgxError(400, f"the body is not {coding}, as its content-encoding says") from None
    check_size(len(plain), limit)
    if not unpacker.eof:
        raise OgxError(400, f"the {coding} body is cut off")
    return plain


def shows_token(headers: Headers, token: bytes) -> bool:
    """Whether a request shows the server's token; takes the same time whatever it shows."""
    import hmac  # only where there is a token, to start smaller

    bearer = re.sub("(?i)^bearer +", "", headers.get("authorization", ""))
    shown = (headers.get("x-api-key", "").encode(), bearer.encode())
    return any([hmac.compare_digest(token, key) for key in shown])


@functools.lru_cache(maxsize=256)
def host_allowed(host: str, bound: str, names: tuple[str, ...] = ()) -> bool:
    """Whether a Host header may come in: configured `names`, those of loopback and, bound
    elsewhere, addresses, which no foreign page can point here."""
    name = re.sub(r":[0-9]*$", "", host).strip("[]").lower()
    if not host or is_loopback(name) or name in (bound.lower(), *names):  # browsers send a Host
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return not is_loopback(bound)


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
# `connect claude`: ask the server for its models, plan the environment (pure), then print it or
# launch Claude Code. What to set and unset was verified with the real client (2.1.332).

INSTALL_WORDS = "Failed to find 'claude' in PATH. Install it from https://claude.com/download"
TOKEN = "ogx"  # a Bearer token; unlike an API key it needs no approval in Claude Code
SMALL_WINDOW = 48_000  # tokens; below, the usual output reserve would compact on every turn
MAX_SETTINGS = 2 * 1024 * 1024  # bytes, as in Claude Code
# Each of these would send requests elsewhere, change how they are sent, or choose another model.
# Variables that the user's own tools need inside Claude Code (AWS_*, GOOGLE_*) stay.
UNSET = (
    "CLAUDE_CODE_USE_VERTEX", "ANTHROPIC_VERTEX_PROJECT_ID", "CLAUDE_CODE_USE_BEDROCK",
    "ANTHROPIC_BEDROCK_SESSION_TOKEN", "CLAUDE_CODE_USE_FOUNDRY", "CLAUDE_CODE_USE_MANTLE",
    "CLAUDE_CODE_USE_ANTHROPIC_AWS", "CLAUDE_CODE_USE_ANTHROPIC_GOOGLE_CLOUD",
    "CLAUDE_CODE_USE_GATEWAY", "ANTHROPIC_UNIX_SOCKET", "ANTHROPIC_API_KEY", "ANTHROPIC_MODEL",
    "ANTHROPIC_SMALL_FAST_MODEL", "ANTHROPIC_CUSTOM_HEADERS", "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_PROVIDER_MANAGED_BY_HOST", "CLAUDE_CODE_HOST_AUTH_ENV_VAR", "CLAUDECODE",
    "CLAUDE_CODE_SUBAGENT_MODEL", "CLAUDE_CODE_MAX_CONTEXT_TOKENS",
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS", "ANTHROPIC_DEFAULT_MODEL")
CLAUDE_COMMANDS = {  # those that start no session
    "agents", "auth", "auto-mode", "config", "doctor", "install", "mcp", "migrate-installer",
    "plugin", "plugins", "setup-token", "update", "upgrade"}
SHELLS = {  # shell -> how it sets and unsets a variable
    "sh": ("export {}={}", "unset {}", shlex.quote),
    "fish": ("set -gx {} {}", "set -e {}",
             lambda text: "'" + re.sub(r"([\\'])", r"\\\1", text) + "'"),
    "powershell": (  # takes curved quotes for straight ones (CharExtensions.IsSingleQuote)
        "$env:{} = {}", "Remove-Item Env:{} -ErrorAction SilentlyContinue",
        lambda text: "'" + re.sub("(['\u2018-\u201b])", r"\1\1", text) + "'")}
CHECK_TOOL = {"name": "add", "description": "Add two numbers.", "input_schema": {
    "type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
    "required": ["a", "b"]}}


@dataclass(frozen=True)
class LaunchPlan:
    """The environment for Claude Code: variables to set, and to unset."""

    set: Mapping[str, str]
    unset: tuple[str, ...]
    model: str = ""  # for all tiers, if the user chose one

    def __post_init__(self) -> None:
        for name, value in self.set.items():
            if BAD_ID.search(value):
                raise OgxError(400, f"{name}: no variable can be {ascii(value)[:200]}")

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in environ.items() if k not in self.unset}
        return {**kept, **self.set}


def connect_claude(options: argparse.Namespace, claude_args: Sequence[str]) -> int:
    """Launch Claude Code on the server's models, or print the environment; its exit code."""
    claude = None if options.print_env or options.check else claude_program(os.environ)
    token = server_token(options, os.environ)
    server = Provider("OGX", ProviderKind("OGX"), server_url(options, os.environ), token or TOKEN)
    own_server = None
    try:
        listing = model_listing(server)
    except OgxError:
        elsewhere = options.host != "localhost" or options.port is not None or options.url
        if not options.serve or elsewhere:
            raise
        token = token or uuid.uuid4().hex  # every user here reaches the port
        own_server, log_file = served_for_session(token)
        server = replace(server, base_url=own_server.url, api_key=token)
        tell(options, f"ogx.py serves {server.base_url} for this session; its log is {log_file}")
        listing = model_listing(server)
    try:
        plan = launch_plan(server.base_url, server.api_key, listing, options, os.environ)
        if options.print_env:
            for path in settings_files(os.environ):
                if overrides(read_settings(path) or {}, plan):
                    tell(options, f"{path} goes before these lines, and leads elsewhere")
            say(*shell_lines(plan, options.shell))
            return 0
        if options.check:
            return print_check(server, plan)
        tell(options, f"Claude Code on {server.base_url}", *plan_lines(plan))
        return launched(options, plan, [claude or "claude", *claude_args])
    finally:
        if own_server:
            own_server.stop(drain=0)


def tell(options: argparse.Namespace, *lines: str) -> None:
    if not options.quiet:
        say(*lines, to="stderr")


def claude_program(environ: Mapping[str, str]) -> str:
    """Claude Code's program, from PATH or where its installers put it."""
    home = os.path.expanduser("~")
    places = [*environ.get("PATH", "").split(os.pathsep), f"{home}/.local/bin",
              f"{home}/.claude/local", f"{home}/.npm-global/bin", "/usr/local/bin",
              "/opt/homebrew/bin"]
    # Windows looks into the working directory as well.
    found = shutil.which("claude", path=os.pathsep.join(filter(os.path.isabs, places)))
    if not found or not os.path.isabs(found):
        raise OgxError(400, INSTALL_WORDS)
    return found


def server_token(options: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """The token of the server: from --api-key-file (arguments show in the process list, so there
    is no flag for the token itself), else OGX_API_KEY, else ""."""
    key = environ.get("OGX_API_KEY", "")
    if options.api_key_file:
        try:
            with open(options.api_key_file, encoding="utf-8") as file:
                key = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            words = getattr(error, "strerror", None) or "not text"
            raise OgxError(400, f"--api-key-file {options.api_key_file}: {words}") from None
        if not key:
            raise OgxError(400, f"--api-key-file {options.api_key_file}: the file is empty")
    if re.search(r"[^\x21-\x7e]", key):
        raise OgxError(400, "OGX_API_KEY: expected printable ASCII without spaces")
    return key


def served_for_session(token: str) -> tuple[Server, str]:
    """A server of our own on a free port, and its log: a file begun anew, the user's alone."""
    state = state_path(None, os.environ)
    log_file = os.path.abspath(f"{state}.log")
    try:
        os.makedirs(os.path.dirname(log_file), mode=0o700, exist_ok=True)
        os.close(os.open(log_file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600))
        start_log(log_file, "info")
    except OSError as error:
        log.addHandler(logging.NullHandler())  # the terminal is Claude Code's
        log_file = f"lost, since {log_file} can't be written: {error.strerror}"
    config = config_from_json(starter_config(), "starter", with_aws_region(os.environ))
    server = Server(Gateway(config, store=Store(state)), token=token)
    server.start()
    server.gateway.start()
    server.gateway.discovered.wait(LIST_TIMEOUT)
    return server, log_file


def server_url(options: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """The server's URL without /v1: from --url, else --host (a name, an address or a URL) and
    --port, else OGX_PORT."""
    url, port = options.url or options.host, options.port
    if not (options.url or "://" in url or re.fullmatch(r"[^:]+:[0-9]+", url)):
        url = f"[{url.strip('[]')}]" if ":" in url else url
        if port is None:
            port = port_number(environ.get("OGX_PORT") or DEFAULT_PORT, "OGX_PORT")
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise OgxError(400, f"--url: expected a URL like http://localhost:8321, got '{url}'")
    if port is not None and parts.port is None:
        parts = parts._replace(netloc=f"{parts.netloc}:{port}")
    return re.sub(r"/(v1/?)?$", "", urllib.parse.urlunsplit(parts))


def model_listing(server: Provider) -> Json:
    """The server's GET /v1/models; raises OgxError in the launcher's words."""
    upstream, at = Upstream(), f"OGX server at {server.base_url}"
    try:
        reply, body = upstream.ask(server, "/v1/models", 10.0)
    except OgxError as error:
        why = error.message.partition(": ")[2] or error.message
        hint = f"Start the server first with: {command_name()} run"
        raise OgxError(502, f"Failed to connect to {at}: {why}\n{hint}") from None
    finally:
        upstream.close()
    listing = dict_or_empty(json_or_none(body))
    if reply.status == 200 and isinstance(listing.get("data"), list):
        return listing
    why = ": it doesn't answer with a model list"
    if reply.status != 200:
        why = f" (HTTP {reply.status})"
    if reply.status == 401:
        why += "\nIt asks for a token: set OGX_API_KEY, or use --api-key-file"
    raise OgxError(502, f"Failed to query models from {at}{why}")


def command_name() -> str:
    """How this program was called, to be typed again."""
    path = sys.argv[0] if sys.argv else ""
    if path.endswith(".py"):
        return f"python3 {shlex.quote(path)}"
    return os.path.basename(path) or "ogx"


def launch_plan(base_url: str, token: str, listing: Json, options: argparse.Namespace,
                environ: Mapping[str, str]) -> LaunchPlan:
    """What to set and unset so that Claude Code talks to the server and knows its models."""
    models = {entry["id"]: entry for entry in listing["data"] if is_listed_llm(entry)}
    if not models:
        raise OgxError(404, "Failed to find any LLM models on the OGX server.")
    tiers = {tier: tier_choice(tier, options, models, listing) for tier in TIERS}
    variables = {"ANTHROPIC_BASE_URL": base_url, "ANTHROPIC_AUTH_TOKEN": token}
    for tier, model_id in tiers.items():
        name = f"ANTHROPIC_DEFAULT_{tier.upper()}_MODEL"
        variables.update({name: model_id, f"{name}_NAME": model_id,
                          f"{name}_DESCRIPTION": f"{tier} tier, served by ogx.py"})
    real = [m for m, e in models.items() if not is_alias(e)]
    if any(re.search("claude|anthropic", model_id, re.I) for model_id in real):
        variables["CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY"] = "1"  # it lists only such ids
    variables["CLAUDE_CODE_DISABLE_1M_CONTEXT"] = "1"
    variables["CLAUDE_CODE_ATTRIBUTION_HEADER"] = "0"  # it would defeat prefix caches
    variables.update(limit_variables([models.get(model_id, {}) for model_id in tiers.values()]))
    host = urllib.parse.urlsplit(base_url).hostname or ""
    for name in ("NO_PROXY", "no_proxy"):  # it looks at the second first
        known = environ.get(name) or environ.get("no_proxy") or environ.get("NO_PROXY") or ""
        hosts = known.replace(",", " ").split()
        hosts += [host, "localhost", "127.0.0.1"] if hosts != ["*"] else []
        variables[name] = ",".join(dict.fromkeys(hosts))
    unset = tuple(name for name in UNSET if name not in variables)
    return LaunchPlan(variables, unset, options.model or "")


def is_listed_llm(entry: Any) -> bool:
    """Whether a list's entry is an LLM, by OGX's metadata, else by its id."""
    model_id = dict_or_empty(entry).get("id")
    if not isinstance(model_id, str) or not 0 < len(model_id) <= 256 or BAD_ID.search(model_id):
        return False
    kind = dict_or_empty(entry.get("custom_metadata")).get("model_type", "llm")
    return kind == "llm" and not NOT_LLM.search(model_id)


def tier_choice(tier: str, options: argparse.Namespace, models: Mapping[str, Json],
                listing: Json) -> str:
    """A tier's model: its flag, else --model, else the server's choice, else the first LLM in the
    list that is no alias."""
    wanted = getattr(options, f"{tier}_model") or options.model
    if wanted:
        if wanted not in models:
            hint = near_miss(wanted, models)
            raise OgxError(404, f"Failed to find model '{wanted}' on the OGX server.{hint}\n"
                                f"Available models: {', '.join(models)}")
        return str(wanted)
    chosen = dict_or_empty(listing.get("tiers")).get(tier)
    if chosen and isinstance(chosen, str):
        return chosen
    return next((m for m, e in models.items() if not is_alias(e)), next(iter(models)))


def is_alias(entry: Json) -> bool:
    return bool(dict_or_empty(entry.get("custom_metadata")).get("alias_of"))


def limit_variables(entries: Sequence[Json]) -> dict[str, str]:
    """Claude Code's window and output limit, in tokens: it knows one for all tiers, so the
    smallest; nothing where the server doesn't know."""
    contexts, outputs = (
        list(filter(None, (first_number(entry, [name]) for entry in entries)))
        for name in ("max_input_tokens", "max_tokens")
    )
    limits = {}
    if contexts:
        limits["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(min(contexts))
        if min(contexts) < SMALL_WINDOW:
            outputs.append(max(1024, min(contexts) // 8))
    if outputs:
        limits["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(min(outputs))
    return limits


def plan_lines(plan: LaunchPlan) -> list[str]:
    """Tiers, window and what to be warned of, for a person."""
    lines = [f"  {tier:<7} {plan.set[f'ANTHROPIC_DEFAULT_{tier.upper()}_MODEL']}" for tier in TIERS]
    window = int(plan.set.get("CLAUDE_CODE_MAX_CONTEXT_TOKENS", 0))
    if window:
        lines.append(f"  window  {window:,} tokens")
    if 0 < window < SMALL_WINDOW:
        lines.append("  warning: Claude Code's own prompt and tools take about 15,000 of them; a "
                     "model with a larger window works better")
    return lines


def shell_lines(plan: LaunchPlan, shell: str = "sh") -> list[str]:
    """Lines that set and unset the plan's variables, safe for the shell's `eval`."""
    export, unset, quoted = SHELLS[shell]
    lines = [export.format(name, quoted(value)) for name, value in plan.set.items()]
    return lines + [unset.format(name) for name in plan.unset]


def launched(options: argparse.Namespace, plan: LaunchPlan, argv: Sequence[str]) -> int:
    """Run Claude Code; its exit code. Settings of our own go before whatever files it reads, in a
    temporary file, since arguments show in the process list."""
    import tempfile

    rest, source = without_settings_flag(argv)
    given = read_settings(source) if source else {}
    if given is None:  # Claude Code says best what is wrong with them
        return exit_code_of(argv, plan.environment(os.environ))
    argv = rest
    files = {path: read_settings(path) or {} for path in settings_files(os.environ)}
    for path, tree in files.items():
        if "managed" in os.path.basename(path) and overrides(tree, plan):
            tell(options, f"  warning: {path} can't be overridden, and names another server or key")
    if is_interactive(argv) and not permission_mode({**files, "": given}):
        # Auto mode asks the model's provider for verdicts on tool calls, which only Anthropic has.
        argv = [argv[0], "--permission-mode", "default", *argv[1:]]
    try:
        handle, path = tempfile.mkstemp(prefix="ogx-", suffix=".json")  # mode 0600
    except OSError as error:
        raise OgxError(500, f"can't write a temporary settings file: {error}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(merged_settings(given, plan), file)
        return exit_code_of([argv[0], "--settings", path, *argv[1:]], plan.environment(os.environ))
    finally:
        with suppress(OSError):
            os.unlink(path)


def without_settings_flag(argv: Sequence[str]) -> tuple[list[str], str]:
    """The arguments without --settings, of which only the last counts, and its value."""
    rest: list[str] = []
    value, words = "", iter(argv)
    for word in words:
        if word == "--settings":
            value = next(words, "")
        elif word.startswith("--settings="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return rest, value


def settings_files(environ: Mapping[str, str]) -> list[str]:
    """Where Claude Code reads settings: the user's, the project's, the administrator's."""
    chosen, home = environ.get("CLAUDE_CONFIG_DIR"), os.path.expanduser("~")
    managed = {"darwin": "/Library/Application Support/ClaudeCode",
               "win32": "C:/ProgramData/ClaudeCode"}.get(sys.platform, "/etc/claude-code")
    return [f"{chosen or home}/.claude.json", f"{chosen or home + '/.claude'}/settings.json",
            ".claude/settings.json", ".claude/settings.local.json",
            f"{managed}/managed-settings.json"]


def read_settings(source: str) -> Json | None:
    """Settings from a file or, as Claude Code's --settings takes them, from JSON text, or None. A
    project's may link to a device, or to /proc, where sizes are 0."""
    data: str | bytes = source
    if not source.lstrip().startswith("{"):
        data = b""
        with suppress(OSError):
            if os.path.isfile(source) and 0 < os.path.getsize(source) <= MAX_SETTINGS:
                with open(source, "rb") as file:
                    data = file.read(MAX_SETTINGS)
    tree = json_or_none(data)
    return tree if isinstance(tree, dict) else None


def overrides(settings: Json, plan: LaunchPlan) -> bool:
    """Whether settings would beat the plan: they go before the environment."""
    names = set(map(str.upper, dict_or_empty(settings.get("env"))))  # Windows ignores case
    known = names.intersection(map(str.upper, [*plan.set, *plan.unset]))
    other_model = plan.model and settings.get("model") not in (None, plan.model)
    return bool(known or settings.get("apiKeyHelper") or other_model)


def merged_settings(given: Json, plan: LaunchPlan) -> Json:
    """The user's own --settings with the plan's variables on top; "" counts as unset."""
    env = {**dict_or_empty(given.get("env")), **dict.fromkeys(plan.unset, ""), **plan.set}
    model = {"model": plan.model} if plan.model else {}
    return {**given, "env": env, "apiKeyHelper": "", **model}


def permission_mode(files: Mapping[str, Json]) -> str:
    """The mode that the user's settings choose, if any."""
    modes = (dict_or_empty(tree.get("permissions")).get("defaultMode") for tree in files.values())
    return next((str(mode) for mode in modes if mode), "")


def is_interactive(argv: Sequence[str]) -> bool:
    """Whether the arguments start a session at the terminal and leave its permission mode open."""
    flags = {word.partition("=")[0] for word in argv[1:]}
    chosen = flags & {"-p", "--print", "--permission-mode", "--dangerously-skip-permissions",
                      "-v", "--version", "-h", "--help"}
    return not chosen and not set(argv[1:2]) & CLAUDE_COMMANDS


def exit_code_of(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program in this terminal and give its exit code, as a shell would."""
    import subprocess

    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: Any) -> None:
        # Ctrl-C reaches the whole foreground group, and Claude Code decides what it means. (It is
        # handled here and not ignored, since SIG_IGN would be inherited.)
        if child and number != signal.SIGINT:
            child.send_signal(number)

    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        ends = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")  # Windows has only the first two
        numbers = [getattr(signal, name) for name in ends if hasattr(signal, name)]
        handlers = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        child = subprocess.Popen(argv, env=environment)
        code = child.wait()
    except OSError as error:
        raise OgxError(500, f"Failed to start '{argv[0]}': {error.strerror}") from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def print_check(server: Provider, plan: LaunchPlan) -> int:
    """Try each tier's model with a real message and a tool, and print a table; 0 when all work."""
    upstream = Upstream()
    models: dict[str, list[str]] = {}
    for tier in TIERS:
        models.setdefault(plan.set[f"ANTHROPIC_DEFAULT_{tier.upper()}_MODEL"], []).append(tier)
    width, failed = max(map(len, models)), False
    for model_id, tiers in models.items():
        body = {"model": model_id, "max_tokens": 1000, "stream": True, "tools": [CHECK_TOOL],
                "messages": [{"role": "user", "content": "Call the tool add with 2 and 3."}]}
        began = time.monotonic()
        first, verdict = 0.0, ""
        try:
            first, message = checked_answer(upstream, server, body)
            calls = [block for block in message["content"] if block["type"] == "tool_use"]
            if not calls:
                verdict = "answers, but called no tool: does the model, and its server, do tools?"
            elif not {"a", "b"} <= set(calls[0]["input"]):
                verdict = f"called the tool wrongly, with {json.dumps(calls[0]['input'])[:80]}"
        except OgxError as error:
            verdict = without_controls(one_line(error.message)) or "failed"
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            verdict = "answers in another format than Anthropic's"
        failed = failed or bool(verdict)
        seconds = f"{first - began if first else 0:6.2f} {time.monotonic() - began:6.2f} s"
        verdict = verdict or "works, tools too"
        say(f"{model_id:<{width}}  {seconds}  {verdict} ({', '.join(tiers)})")
    upstream.close()
    return int(failed)


def checked_answer(upstream: Upstream, server: Provider, body: Json) -> tuple[float, Json]:
    """When the first event of a streamed answer came, and the message; OgxError if it failed."""
    reply = upstream.send(server, "POST", "/v1/messages", json_bytes(body))
    first, told = 0.0, list[bytes]()
    try:
        while not reply.head():
            reply.wait()
        for items in upstream_items(reply):
            if items is None:
                reply.wait()
            told += items or ()
            first = first or (time.monotonic() if told else 0.0)
            if len(told) > 20_000:
                raise OgxError(502, "an answer without end")
    finally:
        reply.release()
    if reply.status != 200:
        raise OgxError(reply.status, refusal_from_body(reply.status, b"".join(told)).message)
    events = map(dict_or_empty, map(json_or_none, told))
    error = next((item for item, event in zip(told, events) if event.get("type") == "error"), b"")
    if error or not told:
        raise OgxError(502, refusal_from_body(502, error).message if error else "an empty answer")
    return first, message_from_events(map(json.loads, told))


# ======== Command line =======================================================================
# One line per flag. Errors are one clear line on stderr and exit code 1.


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    own, forwarded = words[:split], words[split + 1 :]
    parser = argument_parser()
    try:
        options, extra = parser.parse_known_args(own)
        if extra or (forwarded and options.command != "connect"):
            hint = "; arguments for Claude Code go after --" if options.command == "connect" else ""
            parser.error(f"unrecognized arguments: {' '.join(extra or forwarded)}{hint}")
        if options.command == "connect":
            if options.serve and (options.print_env or options.check):
                parser.error("--serve starts a server for a session of Claude Code alone")
            return connect_claude(options, forwarded)
        return run(options)
    except SystemExit as stop:  # argparse, after its own words
        return stop.code if isinstance(stop.code, int) else 1
    except OgxError as error:
        say(error.message, to="stderr")
        return 1
    except RecursionError:
        say("the configuration is nested too deeply", to="stderr")
        return 1
    except KeyboardInterrupt:
        return 130


def argument_parser() -> argparse.ArgumentParser:
    purpose = "Run Claude Code, and every Anthropic SDK program, on any model."
    parser = argparse.ArgumentParser(prog=command_name(), description=purpose)
    parser.add_argument("--version", action="version", version=f"ogx.py {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_run(commands)
    add_connect(commands)
    return parser


def add_run(commands: Any) -> None:
    limits = "".join(f"  OGX_{each.name.upper():<20}{each.default:>4}  {each.metadata['words']}\n"
                     for each in fields(Limits))
    flag = commands.add_parser(
        "run", help="serve the Anthropic Messages API",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"limits, also keys of `server` in the JSON file (client_timeout):\n{limits}",
    ).add_argument
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
    clients = connect.add_subparsers(dest="client", metavar="CLIENT", required=True)
    claude = clients.add_parser("claude", help="Claude Code",
                                usage="%(prog)s [options] [-- CLAUDE_ARGS...]")
    flag = claude.add_argument
    flag("--model", metavar="MODEL", help="model for all tiers (default: the server's choice)")
    for tier in TIERS:
        flag(f"--{tier}-model", metavar="MODEL", help=f"model for the {tier} tier")
    flag("--host", default="localhost", help="server host, or its whole URL (default localhost)")
    flag("--port", type=port_argument, help=f"server port (default OGX_PORT, else {DEFAULT_PORT})")
    flag("--url", help="server URL, with or without /v1, instead of --host and --port")
    flag("--api-key-file", metavar="FILE", help="the server's token (default OGX_API_KEY)")
    flag("--serve", action="store_true", help="start a server for this session if none is running")
    flag("--check", action="store_true", help="try every tier with a real message, launch nothing")
    flag("--print-env", action="store_true", help="print export and unset lines, launch nothing")
    flag("--shell", choices=tuple(SHELLS), default="sh", help="whose lines --print-env prints")
    flag("--quiet", action="store_true", help="launch without a word")


def port_argument(text: str) -> int:
    try:
        return port_number(text, "port")
    except OgxError:
        message = f"expected a port from 0 to 65535, got '{text}'"
        raise argparse.ArgumentTypeError(message) from None


def run(options: argparse.Namespace) -> int:
    """Serve until a signal; the exit code."""
    start_log(options.log_file, options.log_level)
    allow_many_files()
    config = config_from_name(options.config, with_aws_region(os.environ))
    token = server_token(options, os.environ)
    gateway = Gateway(config, store=Store(state_path(options.state, os.environ)))
    port = config.port if options.port is None else options.port
    tls = server_tls(options.tls_cert, options.tls_key) if options.tls_cert else None
    server = Server(gateway, options.host or config.host, port, token, tls)
    server.log_bodies = options.log_bodies
    stopped = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # Gently at the first signal, at once at the second.
            signal.signal(number, lambda *_: os._exit(130) if stopped.is_set() else stopped.set())
    if not is_loopback(server.host) and not token:
        log.warning("listening on %s: everyone who reaches this port can use your providers' keys",
                    server.host)
    server.start()
    gateway.start()
    gateway.discovered.wait(1.0)
    say(*summary_lines(gateway, server))
    while not stopped.is_set() and not gateway.discovered.is_set():
        if gateway.discovered.wait(0.2):
            say(*summary_lines(gateway, server))
    while not stopped.wait(3600):  # a timeout lets Windows deliver Ctrl-C
        pass
    log.info("stopping; running answers have %g s to finish", server.limits.drain_timeout)
    server.stop()
    return 0


def allow_many_files() -> None:
    """Raise this process's limit of open files, 256 on macOS, since a stream takes two."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 10_240 if hard == resource.RLIM_INFINITY else min(10_240, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def server_tls(cert: str, key: str | None) -> ssl.SSLContext:
    """TLS for clients; OgxError names a file that can't be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:
        words = error.strerror or str(error)
        raise OgxError(400, f"--tls-cert {cert}, --tls-key {key or cert}: {words}") from None
    return context


def config_from_name(name: str, environ: Mapping[str, str]) -> Config:
    """The built-in configuration for `starter`, else that of a JSON file."""
    if name == "starter":
        return config_from_json(starter_config(), "starter", environ)
    try:
        with open(name, encoding="utf-8-sig") as file:
            tree = json.load(file)
    except OSError as error:
        expected = "'starter' or a JSON file"
        raise OgxError(400, f"{name}: {error.strerror}; expected {expected}") from None
    except (ValueError, RecursionError) as error:
        raise OgxError(400, f"{name}: not JSON: {error}") from None
    return config_from_json(tree, name, environ)


def summary_lines(gateway: Gateway, server: Server) -> list[str]:
    """What a person wants to know after the start: URL, providers, tiers, what to type next."""
    registry = gateway.registry
    lines = [f"ogx.py {__version__} serves {server.url}", ""]
    width = max(map(len, [*registry.providers, "sonnet"]))
    for provider_id in registry.providers:
        models, problem = registry.lists.get(provider_id), registry.problems.get(provider_id)
        words = f"{len(models)} model{'s' * (len(models) != 1)}" if models else "no models"
        if models is None and not problem:
            words = "still asking for its models"
        lines.append(f"  {provider_id:<{width}}  {words}{': ' + problem if problem else ''}")
        lines += [f"  {'':<{width}}  {model.upstream_id}: {model.warning}"
                  for model in models or () if model.warning]
    if DEMO_PROVIDER.id in registry.providers:
        variables = [kind.switches[0] for kind in PROVIDER_KINDS.values() if kind.switches]
        lines += ["", "No provider is configured: only the built-in demo model answers.",
                  "For real models set one of these variables and start again:",
                  *textwrap.wrap(", ".join(variables), 76, initial_indent="  ",
                                 subsequent_indent="  ")]
    tiers = gateway.tiers()
    lines += ["", *(f"  {tier:<{width}}  {tiers.get(tier, 'no model')}" for tier in TIERS), ""]
    where = "" if server.server_port == DEFAULT_PORT else f" --port {server.server_port}"
    where = f" --url {server.url}" if server.tls else where
    return [*lines, f"Next, in another terminal:  {command_name()} connect claude{where}", ""]


def main_after_parsing(*_: Any) -> None:
    """Run main() when the script's last line is over: until then Python holds what it took to
    parse the file, 15 MB, and glibc would hold it after that."""
    sys.excepthook = sys.__excepthook__
    with suppress(Exception):  # another C library
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
    sys.exit(main())


if __name__ == "__main__":
    sys.excepthook = main_after_parsing
    raise RuntimeError("main() runs where errors of the script are told")
