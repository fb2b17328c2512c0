"""Amazon Bedrock's three servers on loopback, behind one HTTP proxy: they answer by a script.

Every request's signature is checked with botocore before anything else. What the servers are, and
which ids they take, is from AWS's documentation; the words of the refusals are AWS's own.
"""

import datetime
import json
from typing import Any
from urllib.parse import urlsplit

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from scripted_messages import SIGNATURE, message_events, whole_message
from scripted_upstream import Json, ScriptedUpstream, UpstreamHandler, named_event

REGION = "us-west-2"
MANTLE = f"bedrock-mantle.{REGION}.api.aws"
RUNTIME = f"bedrock-runtime.{REGION}.amazonaws.com"
CONTROL = f"bedrock.{REGION}.amazonaws.com"
SERVICES = {MANTLE: "bedrock-mantle", RUNTIME: "bedrock", CONTROL: "bedrock"}
CLAUDE = {MANTLE: "anthropic.claude-opus-5", RUNTIME: "us.anthropic.claude-haiku-5-v1:0"}
OPEN = {MANTLE: "openai.gpt-oss-120b", RUNTIME: "openai.gpt-oss-120b-1:0"}
ROOTS = {MANTLE: "/v1", RUNTIME: "/openai/v1"}
SKEW = 300  # seconds
DATE = "%Y%m%dT%H%M%SZ"


class ScriptedBedrock(ScriptedUpstream):
    """`keys` maps an access key's id to its secret and session token; `asked` holds the signed
    requests, "METHOD host/path", `refused` the words that the others got."""

    def __init__(self) -> None:
        super().__init__(BedrockHandler)
        self.url = self.url[: -len("/v1")]
        self.models = list(OPEN.values())
        self.keys: dict[str, tuple[str, str]] = {}
        self.expired: set[str] = set()  # session tokens
        self.clock = 0.0  # seconds that it is ahead of the others
        self.asked: list[str] = []
        self.refused: list[str] = []
        self.betas: list[str] = []


class BedrockHandler(UpstreamHandler):
    server: ScriptedBedrock

    def do_GET(self) -> None:  # noqa: N802
        if not self.is_signed(b""):
            return
        where = self.place
        if where == f"{MANTLE}/v1/models":
            ids = [CLAUDE[MANTLE], OPEN[MANTLE]]
            return self.answer(200, {"object": "list", "data": [{"id": name} for name in ids]})
        if where == f"{CONTROL}/inference-profiles":
            ids = [CLAUDE[RUNTIME], "us.meta.llama5-v1:0"]
            profiles = [{"inferenceProfileId": name, "status": "ACTIVE"} for name in ids]
            return self.answer(200, {"inferenceProfileSummaries": profiles})
        if where == f"{CONTROL}/foundation-models":
            ids = [OPEN[RUNTIME], "meta.llama5-v1:0", "anthropic.claude-opus-5"]
            return self.answer(200, {"modelSummaries": [{"modelId": name} for name in ids]})
        return self.refuse_in_aws_shape(404, "Not Found")

    def do_POST(self) -> None:  # noqa: N802
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.is_signed(data):
            return
        body, host, where = json.loads(data), urlsplit(self.path).netloc, self.place
        self.server.requests.append(body)
        model = body.get("model")
        if where == f"{host}{ROOTS.get(host)}/chat/completions":
            if model == OPEN[host]:
                return self.complete(body)
            return self.refuse(400, f"The model '{model}' does not support the "
                               "'/v1/chat/completions' API.")
        if not where.startswith(f"{host}/anthropic/v1/messages") or host not in CLAUDE:
            return self.refuse_in_aws_shape(404, "Not Found")
        problem = messages_problem(body, self.headers, host)
        if problem:
            self.server.refusals.append(problem)
            inner = {"type": "invalid_request_error", "message": problem}
            return self.answer(400, {"type": "error", "error": inner})
        if where.endswith("/count_tokens"):
            return self.answer(200, {"input_tokens": 4321})
        return self.send_message(body)

    @property
    def place(self) -> str:
        """Host and path of the request."""
        parts = urlsplit(self.path)
        return parts.netloc + parts.path

    def is_signed(self, data: bytes) -> bool:
        """Whether the signature is right; else the refusal was sent."""
        words = self.signature_problem(data)
        if words:
            self.server.refused.append(words)
            self.refuse_in_aws_shape(403, words)
        else:
            self.server.asked.append(f"{self.command} {self.place}")
        return not words

    def signature_problem(self, data: bytes) -> str:
        """What AWS would say about the signature; "" for a right one."""
        head = self.headers.get("Authorization", "")
        if not head.startswith("AWS4-HMAC-SHA256 ") or "x-amz-date" not in self.headers:
            return "Missing Authentication Token"
        fields = dict(part.split("=", 1) for part in head.partition(" ")[2].split(", "))
        key_id, _, region, service, _ = fields["Credential"].split("/")
        token, host = self.headers.get("x-amz-security-token", ""), urlsplit(self.path).netloc
        if key_id not in self.server.keys or self.server.keys[key_id][1] != token:
            return "The security token included in the request is invalid."
        if token in self.server.expired:
            return "The security token included in the request is expired"
        if (region, service) != (REGION, SERVICES[host]):
            return f"Credential should be scoped to a valid region: {region}/{service}"
        date = self.headers["x-amz-date"]
        utc, ahead = datetime.timezone.utc, datetime.timedelta(0, self.server.clock)
        now = datetime.datetime.now(utc) + ahead
        then = datetime.datetime.strptime(date, DATE).replace(tzinfo=utc)
        if (now - then).total_seconds() > SKEW:
            least = (now - datetime.timedelta(0, SKEW)).strftime(DATE)
            return (f"Signature expired: {date} is now earlier than {least} "
                    f"({now.strftime(DATE)} - 5 min.)")
        names = fields["SignedHeaders"].split(";")
        if "host" not in names or self.headers["Host"] != host or (
            "Content-Type" in self.headers and "content-type" not in names
        ):
            return "The headers host and content-type must be signed."
        if fields["Signature"] != self.signature(names, date, data, key_id):
            return ("The request signature we calculated does not match the signature you provided."
                    f" The Canonical String should have been 'x-amz-security-token:{token}'")
        return ""

    def signature(self, names: list[str], date: str, data: bytes, key_id: str) -> str:
        """The signature that botocore makes for this request."""
        secret, token = self.server.keys[key_id]
        signer = SigV4Auth(Credentials(key_id, secret, token or None),
                           SERVICES[urlsplit(self.path).netloc], REGION)
        headers = {name: self.headers[name] for name in names}
        request = AWSRequest(self.command, self.path, headers, data)
        request.context["timestamp"] = date
        words = signer.string_to_sign(request, signer.canonical_request(request))
        signature: str = signer.signature(words, request)
        return signature

    def refuse_in_aws_shape(self, status: int, message: str) -> None:
        self.answer(status, {"message": message})

    def send_message(self, body: Json) -> None:
        """Answer a Messages request as Claude does."""
        self.server.betas.append(self.headers.get("anthropic-beta", ""))
        reply = self.server.reply(body["messages"])
        if reply.status != 200:
            return self.refuse_in_aws_shape(reply.status, reply.text)
        events = list(message_events(reply, body, len(body["messages"])))
        if not body.get("stream"):
            return self.answer(200, whole_message(events))
        return self.send_stream(reply, list(map(named_event, events)))


def messages_problem(body: Json, headers: Any, host: str) -> str:
    """Why Claude on Bedrock would refuse a request; "" where it takes it."""
    if not headers.get("anthropic-version"):
        return "anthropic-version: header is required"
    if body.get("model") != CLAUDE[host]:
        return f"The provided model identifier is invalid: {body.get('model')}"
    if "x-anthropic-billing-header" in json.dumps(body):
        return "the billing header is none of our business"
    for message in body["messages"]:
        for block in message["content"] if isinstance(message["content"], list) else ():
            if block["type"] == "thinking" and block["signature"] != SIGNATURE:
                return "messages: Invalid `signature` in `thinking` block"
    return ""
