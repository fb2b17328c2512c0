"""What the tests of the Python SDKs ask, and how they look at the answers."""

import warnings
from typing import Any

import anthropic
import pydantic
from gateways import MODEL
from scripted_upstream import Json

WEATHER: Json = {
    "name": "weather", "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
USER = {"role": "user", "content": "Hello there"}
ASK: Json = {"model": MODEL, "max_tokens": 100, "messages": [USER]}


class City(pydantic.BaseModel):
    name: str
    people: int


def valid(answer: Any) -> Any:
    """The answer, once its own model has found it complete and has nothing to warn about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        type(answer).model_validate(answer.model_dump(mode="json"))
    return answer


def answer(sdk: anthropic.Anthropic, streams: bool, **request: Any) -> Any:
    """The answer, valid for the SDK, whichever way it came."""
    if not streams:
        return valid(sdk.messages.create(**request))
    with sdk.messages.stream(**request) as stream:
        return valid(stream.get_final_message())
