"""What vendors refuse that OpenAI takes, in their own words: functions of a request's body for the
`demand` of a ScriptedUpstream, which return "" for a body that is right."""

import json
import re
from collections.abc import Iterator

from scripted_upstream import Json, Reply, check, parts


def ids_and_calls(body: Json) -> tuple[list[str], list[Json]]:
    turns = [m for m in body["messages"] if m.get("tool_calls")]
    return [call["id"] for turn in turns for call in turn["tool_calls"]], turns


DEMANDS = {
    "mistral": lambda body: next((
        f"Tool call id was {one} but must be a-z, A-Z, 0-9, with a length of 9."
        for one in ids_and_calls(body)[0] if not re.fullmatch("[a-zA-Z0-9]{9}", one)), ""),
    "deepseek": lambda body: next((
        "The `reasoning_content` in the thinking mode must be passed back to the API."
        for turn in ids_and_calls(body)[1] if not turn.get("reasoning_content")), ""),
    "groq": lambda body: "property 'prompt_cache_key' is unsupported"
        if "prompt_cache_key" in body else "",
    "old": lambda body: "Unsupported parameter: 'max_completion_tokens' is not supported with this "
        "model. Use 'max_tokens' instead." if "max_completion_tokens" in body else "",
    "qwen": lambda body: "System message must be at the beginning."
        if any(m["role"] == "system" for m in body["messages"][1:]) else "",
    "template": lambda body: "After the optional system message, conversation roles must alternate"
        if any(a["role"] == "tool" and b["role"] == "user"
               for a, b in zip(body["messages"], body["messages"][1:])) else "",
    "schema": lambda body: "Invalid schema for function 'X': 'propertyNames' is not permitted."
        if "propertyNames" in json.dumps(body["tools"]) else "",
}


def unlike_mistral(body: Json) -> str:
    """What api.mistral.ai refuses in a request that OpenAI would take, in its words."""
    known = {"model", "messages", "tools", "tool_choice", "temperature", "top_p", "max_tokens",
             "stream", "stop", "response_format", "parallel_tool_calls", "reasoning_effort"}
    for name in body:
        if name not in known:
            return json.dumps({"detail": [{"type": "extra_forbidden", "loc": ["body", name],
                                           "msg": "Extra inputs are not permitted"}]})
    roles = [message["role"] for message in body["messages"]]
    for before, after in zip(["", *roles], roles):
        if (before, after) in (("tool", "user"), ("tool", "system"), ("assistant", "system"),
                               ("user", "system"), ("user", "user")):
            return f"Unexpected role '{after}' after role '{before}'"
    return DEMANDS["mistral"](body)


def unlike_deepseek(body: Json) -> str:
    """What api.deepseek.com refuses: images, and a call without the thoughts that led to it."""
    if parts(body, "image_url"):
        return "Failed to deserialize the JSON body into the target type: messages[5]: unknown " \
               "variant `image_url`, expected `text` at line 1 column 70914"
    if "max_completion_tokens" in body or "prompt_cache_key" in body:
        return "Failed to deserialize the JSON body into the target type: unknown field"
    silent = [{k: v for k, v in message.items() if k != "reasoning_content"}
              for message in body["messages"]]
    try:
        check({**body, "messages": silent})
    except ValueError as error:
        return str(error)
    return DEMANDS["deepseek"](body)


class MistralReply(Reply):
    """Its reasoning comes as parts of the content, which is a list then."""

    def deltas(self, turn: int) -> Iterator[Json]:
        for delta in super().deltas(turn):
            thought = [{"type": "text", "text": delta.get("reasoning_content")}]
            told = {"content": [{"type": "thinking", "thinking": thought}]}
            yield told if "reasoning_content" in delta else delta
