"""Print the signatures that botocore makes, as the table SIGNATURES of test_ogx.py.

    .clients/venv/bin/python .ci/clients/signatures.py
"""

import datetime
from unittest.mock import patch

from botocore import auth, awsrequest, credentials

NOW = 1_790_000_000
KEY_ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
RUNTIME, MANTLE = "bedrock-runtime.us-east-1.amazonaws.com", "bedrock-mantle.eu-west-1.api.aws"
SHORT = {"R": f"https://{RUNTIME}", "M": f"https://{MANTLE}", "L": "http://127.0.0.1:8080"}
JSON = {"content-type": "application/json"}
# Words, method, URL whose host is shortened, headers beside the host, body, session token.
CASES = (
    ("a list", "GET", "M/v1/models", {}, b"", ""),
    ("an empty path", "GET", "M", {}, b"", ""),
    ("a message", "POST", "M/anthropic/v1/messages", JSON, b'{"model":"x"}', ""),
    ("a session token", "POST", "M/anthropic/v1/messages", JSON, b"{}", "IQoJb3JpZ2lu+/Z2lu=="),
    ("an empty body", "POST", "R/openai/v1/chat/completions", JSON, b"", "token"),
    ("a colon", "POST", "R/model/us.anthropic.claude-v1:0/invoke", JSON, b"{}", ""),
    ("an encoded colon", "POST", "R/model/us.anthropic.claude-v1%3A0/invoke", JSON, b"{}", ""),
    ("an ARN", "POST", "R/model/arn%3Aaws%3Abedrock%3A%3A1%3Aprofile%2Fabc/invoke", {}, b"", ""),
    ("marks", "GET", "R/a~b-c_d.e/f(g)+h,i@j!k*l'm$n&o;p=q", {}, b"", ""),
    ("unicode in the path", "GET", "R/model/caf%C3%A9-%F0%9F%98%80", {}, b"", ""),
    ("unicode in the body", "POST", "R/model", JSON, '{"a":"caf\u00e9 \U0001f600"}'.encode(), ""),
    ("a query", "GET", "R/inference-profiles?type=SYSTEM_DEFINED&maxResults=1000", {}, b"", "t"),
    ("an encoded query", "GET", "R/l?nextToken=a%2Fb%2B%3D&b=%C3%A9%20z", {}, b"", ""),
    ("a query's order", "GET", "R/l?a=1&a-b=2&a=0&B=3&a.b=4&a%20=5", {}, b"", ""),
    ("no value", "GET", "R/l?flag&b=&a", {}, b"", ""),
    ("repeated spaces", "POST", "R/l", {"X-Amz-B": "  two   words \t here ", **JSON}, b"{}", ""),
    ("a port", "POST", "L/v1/chat/completions", JSON, b"{}", "t"),
)


def signature(method, url, headers, body, token, scope, now=NOW):
    """What botocore puts into the header Authorization."""
    region, service = scope.split("/")
    keys = credentials.Credentials(KEY_ID, SECRET, token or None)
    request = awsrequest.AWSRequest(method, url, headers, body)
    moment = datetime.datetime.fromtimestamp(now, datetime.timezone.utc)
    with patch.object(auth, "get_current_datetime", lambda: moment):
        auth.SigV4Auth(keys, service, region).add_auth(request)
    return request.headers["Authorization"]


def request_of(short, headers):
    """The URL, the headers with the host, and the scope of a case."""
    url = SHORT[short[0]] + short[1:]
    scope = "eu-west-1/bedrock-mantle" if short[0] == "M" else "us-east-1/bedrock"
    return url, {"host": url.split("/")[2], **headers}, scope


def table():
    """The cases with their signatures, as Python source."""
    lines = ["SIGNATURES = ("]
    for words, method, short, headers, body, token in CASES:
        url, all_headers, scope = request_of(short, headers)
        made = signature(method, url, all_headers, body, token, scope).rpartition("=")[2]
        body = ascii(body)
        lines.append(f'    ("{words}", "{method}", "{short}",')
        lines.append(f'     {headers}, {body}, "{token}",')
        lines.append(f'     "{made}"),')
    return "\n".join([*lines, ")  # fmt: skip"])


if __name__ == "__main__":
    print(table())
